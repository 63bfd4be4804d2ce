"""Holds discovered boxes as a table (`BoxTable`), writes it as Parquet or COCO results JSON, and reads such files (`read_boxes`)."""

import dataclasses
import json
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
class BoxTable:
    """Boxes of many images, one a row."""

    image_ids: tuple[str, ...]
    boxes_xyxy: np.ndarray  # float64 (n, 4), half-open, pixels of the upright source image
    scores: np.ndarray  # float64 (n,)
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def best(self) -> dict[str, np.ndarray]:
        """Image id → the box of the highest score, float64 (4,); of equal scores the first."""
        best: dict[str, int] = {}
        for row, image_id in enumerate(self.image_ids):
            if image_id not in best or self.scores[row] > self.scores[best[image_id]]:
                best[image_id] = row
        return {image_id: self.boxes_xyxy[row] for image_id, row in best.items()}

    def with_categories(self, categories: Sequence[str]) -> "BoxTable":
        """The same boxes as objects of `categories`, one a row."""
        return dataclasses.replace(self, categories=tuple(categories))


def write_parquet(boxes: BoxTable, uri: str) -> None:
    """Write boxes as a Parquet file that fine-tuning takes (`boxes=FILE`)."""
    x0, y0, x1, y1 = boxes.boxes_xyxy.astype(np.float32).T
    columns = [list(boxes.image_ids), x0, y0, x1, y1, boxes.scores.astype(np.float32), list(boxes.categories)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, BOXES_SCHEMA, strict=True)]
    with atomic_write(*resolve_uri(uri)) as sink:
        pq.write_table(pa.table(arrays, schema=BOXES_SCHEMA), sink, compression="zstd")


def write_coco_results(boxes: BoxTable, uri: str, *, category_ids: Mapping[str, int] | None = None) -> None:
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


def read_boxes(uri: str) -> BoxTable:
    """Boxes from this project's Parquet, from COCO results JSON, or from JSON of `{image name: [x0, y0, x1, y1]}`, by the ending.

    Raises:
        DataError: there is no such file, its ending is another, or its content is not boxes.
    """
    readers = {".parquet": _from_parquet, ".json": _from_json}
    if uri.endswith((".pkl", ".pickle")):
        raise DataError(
            f"{uri}: pickles are not read, because a pickle can run any code; convert it once to JSON, as "
            "docs/guides/lost-pickles.md shows"
        )
    reader = next((reader for ending, reader in readers.items() if uri.endswith(ending)), None)
    if reader is None:
        raise DataError(f"{uri}: the ending of a file of boxes is {' or '.join(readers)}")
    try:
        boxes = reader(read_bytes(*resolve_uri(uri)))
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from None
    except (DataError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{uri}: is not a file of boxes ({' '.join(str(error).split())[:200]})") from None
    if not np.isfinite(boxes.boxes_xyxy).all() or not np.isfinite(boxes.scores).all():
        raise DataError(f"{uri}: has a box or score that is not a finite number")
    return boxes


def _from_parquet(data: bytes) -> BoxTable:
    table = pq.read_table(pa.BufferReader(data), schema=None)
    if missing := [name for name in BOXES_SCHEMA.names if name not in table.column_names]:
        raise DataError(f"it lacks the columns {', '.join(missing)}")
    return BoxTable(
        image_ids=tuple(table["image_id"].to_pylist()),
        boxes_xyxy=np.stack([table[side].to_numpy().astype(np.float64) for side in ("x0", "y0", "x1", "y1")], axis=1),
        scores=table["score"].to_numpy().astype(np.float64),
        categories=tuple(table["category"].to_pylist()),
    )


def _from_json(data: bytes) -> BoxTable:
    content = json.loads(data)
    if isinstance(content, dict):
        return _one_box_an_image(content)
    xywh = np.array([row["bbox"] for row in content], dtype=np.float64).reshape(-1, 4)
    return BoxTable(
        image_ids=tuple(str(row["image_id"]) for row in content),
        boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        scores=np.array([row.get("score", 1.0) for row in content], dtype=np.float64),
        categories=tuple(str(row.get("category_id", AGNOSTIC)) for row in content),
    )


def _one_box_an_image(content: Mapping[str, Any]) -> BoxTable:
    """One box of each image; the id of an image is its file name without folder and ending: `000005.jpg` is image 000005."""
    boxes = np.array([np.asarray(box, dtype=np.float64).reshape(4) for box in content.values()]).reshape(-1, 4)
    names = [str(name) for name in content]
    stems = [name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2] for name in names]
    return BoxTable(
        image_ids=tuple(stems), boxes_xyxy=boxes, scores=np.ones(len(boxes)), categories=(AGNOSTIC,) * len(boxes)
    )
