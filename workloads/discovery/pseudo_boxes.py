"""Boxes that were found: as a table, as Parquet, as COCO results JSON, and read from files that other programs wrote."""

import collections
import dataclasses
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.store.objects import AGNOSTIC, BOXES_SCHEMA
from workloads.errors import DataError
from workloads.storage.filesystems import atomic_write, read_bytes, resolve_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBoxes:
    """Boxes of many images, one a row."""

    image_ids: tuple[str, ...]
    boxes_xyxy: np.ndarray  # float64 (n, 4), half-open, pixels of the upright source image
    scores: np.ndarray  # float64 (n,)
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def best(self) -> dict[str, np.ndarray]:
        """The box of the highest score of each image, float64 (4,); of equals the first."""
        found: dict[str, int] = {}
        for row, image_id in enumerate(self.image_ids):
            if image_id not in found or self.scores[row] > self.scores[found[image_id]]:
                found[image_id] = row
        return {image_id: self.boxes_xyxy[row] for image_id, row in found.items()}

    def with_categories(self, categories: Sequence[str]) -> "FoundBoxes":
        """The same boxes as objects of `categories`, one a row."""
        return dataclasses.replace(self, categories=tuple(categories))


def write_parquet(boxes: FoundBoxes, uri: str) -> None:
    """Write boxes as the Parquet file that a detector is trained on."""
    x0, y0, x1, y1 = boxes.boxes_xyxy.astype(np.float32).T
    columns = [list(boxes.image_ids), x0, y0, x1, y1, boxes.scores.astype(np.float32), list(boxes.categories)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, BOXES_SCHEMA, strict=True)]
    with atomic_write(*resolve_uri(uri)) as sink:
        pq.write_table(pa.table(arrays, schema=BOXES_SCHEMA), sink, compression="zstd")


def write_coco_results(boxes: FoundBoxes, uri: str, *, category_ids: Mapping[str, int] | None = None) -> None:
    """Write boxes in COCO's results format: `[{image_id, category_id, bbox: [x, y, width, height], score}, …]`.

    Args:
        category_ids: category → id; default: the categories in alphabetical order, from 1. Image ids that are numbers, as
            COCO's, are written as numbers.
    """
    if category_ids is None:
        category_ids = {name: i for i, name in enumerate(sorted(set(boxes.categories)), start=1)}
    rows = []
    for row, image_id in enumerate(boxes.image_ids):
        x0, y0, x1, y1 = boxes.boxes_xyxy[row].tolist()
        as_number = image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id
        rows.append(
            {
                "image_id": int(image_id) if as_number else image_id,
                "category_id": category_ids[boxes.categories[row]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(boxes.scores[row]),
            }
        )
    text = json.dumps(rows, allow_nan=False) + "\n"
    with atomic_write(*resolve_uri(uri)) as file:
        file.write(text.encode())


def read_boxes(uri: str) -> FoundBoxes:
    """Boxes from our Parquet, COCO results JSON, LOST's pickle of predictions, or the JSON made of such a pickle, by its ending.

    Raises:
        DataError: no such file, another ending, or not what the ending promises.
    """
    readers = {".parquet": _from_parquet, ".json": _from_json, ".pkl": boxes_of_pickle, ".pickle": boxes_of_pickle}
    reader = next((reader for ending, reader in readers.items() if uri.endswith(ending)), None)
    if reader is None:
        raise DataError(f"{uri}: boxes are read from {', '.join(readers)}")
    try:
        boxes = reader(read_bytes(*resolve_uri(uri)))
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from None
    except (DataError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{uri}: holds no boxes that can be read ({' '.join(str(error).split())[:200]})") from None
    if not np.isfinite(boxes.boxes_xyxy).all() or not np.isfinite(boxes.scores).all():
        raise DataError(f"{uri}: holds a box or score that is no finite number")
    return boxes


def _from_parquet(data: bytes) -> FoundBoxes:
    table = pq.read_table(pa.BufferReader(data), schema=None)
    if missing := [name for name in BOXES_SCHEMA.names if name not in table.column_names]:
        raise DataError(f"lacks the columns {', '.join(missing)}")
    return FoundBoxes(
        image_ids=tuple(table["image_id"].to_pylist()),
        boxes_xyxy=np.stack([table[side].to_numpy().astype(np.float64) for side in ("x0", "y0", "x1", "y1")], axis=1),
        scores=table["score"].to_numpy().astype(np.float64),
        categories=tuple(table["category"].to_pylist()),
    )


def _from_json(data: bytes) -> FoundBoxes:
    content = json.loads(data)
    if isinstance(content, dict):
        return _one_box_an_image(content)
    xywh = np.array([row["bbox"] for row in content], dtype=np.float64).reshape(-1, 4)
    return FoundBoxes(
        image_ids=tuple(str(row["image_id"]) for row in content),
        boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        scores=np.array([row.get("score", 1.0) for row in content], dtype=np.float64),
        categories=tuple(str(row.get("category_id", AGNOSTIC)) for row in content),
    )


def boxes_of_pickle(data: bytes) -> FoundBoxes:
    """The boxes of a pickle of LOST's: {image name: array [x0, y0, x1, y1]}. Nothing in it is executed.

    Raises:
        DataError: it holds anything but names and plain arrays of numbers.
    """
    return _one_box_an_image(pickle_to_json(data))


def _one_box_an_image(content: Mapping[str, Any]) -> FoundBoxes:
    """An image's file name stands for its id: `000005.jpg` is image 000005."""
    boxes = np.array([np.asarray(box, dtype=np.float64).reshape(4) for box in content.values()]).reshape(-1, 4)
    names = [str(name) for name in content]
    stems = [name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2] for name in names]
    return FoundBoxes(
        image_ids=tuple(stems), boxes_xyxy=boxes, scores=np.ones(len(boxes)), categories=(AGNOSTIC,) * len(boxes)
    )


class _Array:
    """What stands for a numpy array while a pickle is read: it notes its state and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.values: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
            raise DataError("an array is not one of plain numbers")
        flat = np.frombuffer(bytes(data), dtype=dtype.numpy())
        self.values = flat.reshape(shape, order="F" if by_columns else "C").tolist()


class _Dtype:
    """What stands for a numpy dtype: the name of a plain number's, with its byte order."""

    def __init__(self, name: str = "", *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise DataError(f"arrays of {self.name!r} are not read")
        return np.dtype((">" if self.order == ">" else "<") + self.name)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    """An array as protocol 5 has it."""
    made = _Array()
    made.__setstate__((1, shape, dtype, order == "F", bytes(data) if isinstance(data, (bytes, bytearray)) else data))
    return made


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise DataError("a number is not a plain one")
    return np.frombuffer(bytes(data), dtype=dtype.numpy())[0].item()


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes as Python 2's protocol has them: text in Latin-1."""
    if not isinstance(text, str) or encoding != "latin1":
        raise DataError("bytes are not in Latin-1")
    return text.encode("latin1")


class _Mapping(dict[Any, Any]):
    """What stands for a defaultdict, whose factory nobody needs."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


_STAND_INS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _Mapping,
}


class _Reader(pickle.Unpickler):
    """An unpickler that knows stand-ins for arrays of numbers and nothing that could act."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise DataError(f"it wants {module}.{name}, which is not a plain array or number") from None

    def persistent_load(self, _: Any) -> Any:
        raise DataError("it refers to things outside of itself")


def pickle_to_json(data: bytes) -> dict[str, Any]:
    """A pickle of {name: array of numbers} as what JSON can hold, {name: nested lists}; nothing in it is executed.

    Raises:
        DataError: it is no pickle, is damaged, or holds anything else.
    """
    try:
        content = _Reader(io.BytesIO(data)).load()
        if not isinstance(content, dict):
            raise DataError(f"it holds a {type(content).__name__}, not boxes by image")
        return {str(name): _plain(value) for name, value in content.items()}
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises whatever the broken place leads to
        raise DataError(f"it is no pickle of boxes ({type(error).__name__})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DataError(f"a {type(value).__name__} is no box")
