"""Objects that a detector is trained and measured on: `read_objects`, from the dataset, a file of boxes or panoptic masks."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from workloads.data.store.annotations import read_annotations
from workloads.data.store.image_file import open_image
from workloads.data.store.manifest import Dataset
from workloads.errors import DataError
from workloads.storage.filesystems import read_bytes, resolve_uri

AGNOSTIC = "object"
"""The one category of class-agnostic detection."""

BOXES_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        *((side, pa.float32()) for side in ("x0", "y0", "x1", "y1")),
        ("score", pa.float32()),
        ("category", pa.string()),
    ]
)
"""Columns of a file of boxes; boxes are half-open, in pixels of the upright source image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """The objects of one image; all have an area."""

    size_hw: tuple[int, int]  # pixels of the upright source image
    boxes_xyxy: np.ndarray  # float32 (n, 4), pixels of the upright source image
    categories: tuple[str, ...]
    crowd: np.ndarray  # bool (n,): a region of many objects; not trained on, and detections in it are ignored
    difficult: np.ndarray  # bool (n,): not trained on, and detections of it are ignored
    segments: np.ndarray | None = None  # int64 (n,): ids in the image's panoptic mask

    def trained(self) -> np.ndarray:
        """bool (n,): the objects that a detector is trained on."""
        return ~(self.crowd | self.difficult)


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticMasks:
    """COCO's panoptic masks: an RGB PNG an image, whose pixels are segment ids, least byte first."""

    filesystem: FileSystem
    files: Mapping[str, str]  # image id → path
    objects: Mapping[str, Objects]  # image id → its things; stuff is left out

    def ids(self, image_id: str) -> np.ndarray:
        """int64 (H, W): the segment of each pixel; 0 for none.

        Raises:
            DataError: the PNG is missing or unreadable.
        """
        try:
            return segment_ids(read_bytes(self.filesystem, self.files[image_id]))
        except Exception as error:  # damaged bytes raise nearly any kind
            raise DataError(f"{self.files[image_id]}: not a readable panoptic mask ({error}); restore it") from None


def segment_ids(png: bytes) -> np.ndarray:
    """int64 (H, W): the ids of a PNG's pixels: R + 256 G + 65536 B as COCO's panoptic masks, or the value of grey ones."""
    with open_image(png) as image:
        if image.mode in ("L", "I", "I;16", "I;16B", "I;16L", "P"):
            return np.asarray(image).astype(np.int64)
        pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    return pixels @ np.array([1, 256, 65536])


def read_objects(
    dataset: Dataset, *, boxes: str | None = None, masks: "PanopticMasks | None" = None, class_agnostic: bool = False
) -> dict[str, Objects]:
    """Read the objects of every image, by image id, in the dataset's order.

    Args:
        boxes: a Parquet file (`BOXES_SCHEMA`) whose objects replace the dataset's own.
        masks: panoptic masks, whose things replace the dataset's own.
        class_agnostic: every category becomes `AGNOSTIC`.

    Raises:
        DataError: a shard or the file cannot be read, or the file has none of the dataset's images.
    """
    given = read_boxes(boxes) if boxes is not None else None
    found: dict[str, Objects] = {}
    for image_id, own in read_annotations(dataset).items():
        objects = Objects(
            size_hw=own.size_hw,
            boxes_xyxy=own.boxes_xyxy,
            categories=own.categories,
            crowd=own.crowd,
            difficult=own.difficult,
        )
        if given is not None:
            objects = _objects(own.size_hw, *given.get(image_id, (np.zeros((0, 4)), ())))
        elif masks is not None:
            objects = masks.objects.get(image_id) or _objects(own.size_hw, np.zeros((0, 4)), ())
        found[image_id] = _with_area(objects, class_agnostic)
    if given is not None and not given.keys() & found.keys():
        raise DataError(
            f"{boxes}: has none of the images of {dataset.uri} (its first is {next(iter(given), 'missing')!r}); "
            "give boxes of this dataset"
        )
    return found


def _objects(
    size_hw: tuple[int, int], boxes: np.ndarray, categories: Sequence[str], segments: np.ndarray | None = None
) -> Objects:
    nothing = np.zeros(len(boxes), dtype=bool)
    return Objects(
        size_hw=size_hw,
        boxes_xyxy=boxes.astype(np.float32),
        categories=tuple(categories),
        crowd=nothing,
        difficult=nothing.copy(),
        segments=segments,
    )


def _with_area(objects: Objects, class_agnostic: bool) -> Objects:
    """`objects` clipped to the image, without those that have no area left."""
    height, width = objects.size_hw
    boxes = objects.boxes_xyxy.clip(0, np.array([width, height, width, height], dtype=np.float32))
    keep = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    names = [name for name, kept in zip(objects.categories, keep.tolist(), strict=True) if kept]
    return Objects(
        size_hw=objects.size_hw,
        boxes_xyxy=boxes[keep],
        categories=tuple(AGNOSTIC for _ in names) if class_agnostic else tuple(names),
        crowd=objects.crowd[keep],
        difficult=objects.difficult[keep],
        segments=None if objects.segments is None else objects.segments[keep],
    )


def read_boxes(uri: str) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Read boxes float32 (n, 4) and categories by image id from a Parquet file of `BOXES_SCHEMA`.

    Raises:
        DataError: no such file, a column missing, or a box with NaN or infinite sides.
    """
    filesystem, path = resolve_uri(uri)
    names = [name for name in BOXES_SCHEMA.names if name != "score"]
    try:
        table = pq.read_table(path, filesystem=filesystem, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"boxes: {uri} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if missing := set(names) - set(table.column_names):
        raise DataError(f"boxes: {uri} has no column {', '.join(sorted(missing))}; expected {', '.join(names)}")
    sides = np.stack([table[side].to_numpy().astype(np.float32) for side in ("x0", "y0", "x1", "y1")], axis=1)
    if not np.isfinite(sides).all():
        raise DataError(f"boxes: {uri} has a box with NaN or infinite sides; write it again")
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, image_id in enumerate(table["image_id"].to_pylist()):
        rows[image_id].append(row)
    categories = table["category"].to_pylist()
    return {image: (sides[place], tuple(categories[row] for row in place)) for image, place in rows.items()}


def read_panoptic(uri: str) -> PanopticMasks:
    """Open the masks of COCO's panoptic JSON at `uri`; the PNGs are in the folder of its name without `.json`.

    Raises:
        DataError: it cannot be read, or is not in COCO's panoptic format.
    """
    filesystem, path = resolve_uri(uri)
    try:
        data = json.loads(read_bytes(filesystem, path))
        things = {kind["id"]: kind["name"] for kind in data["categories"] if kind["isthing"]}
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        files, found = {}, {}
        for entry in data["annotations"]:
            segments = [s for s in entry["segments_info"] if s["category_id"] in things]
            xywh = np.array([s["bbox"] for s in segments], dtype=np.float32).reshape(-1, 4)
            objects = _objects(
                sizes[entry["image_id"]],
                np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
                [things[s["category_id"]] for s in segments],
                np.array([s["id"] for s in segments], dtype=np.int64),
            )
            objects.crowd[:] = [bool(s.get("iscrowd", 0)) for s in segments]
            files[str(entry["image_id"])] = f"{path.removesuffix('.json')}/{entry['file_name']}"
            found[str(entry["image_id"])] = objects
    except OSError as error:
        raise DataError(f"masks: {uri} cannot be read ({error}); give COCO's panoptic json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"masks: {uri} is not in COCO's panoptic format ({error!r})") from None
    return PanopticMasks(filesystem=filesystem, files=files, objects=found)


def category_names(dataset: Dataset, objects: Mapping[str, Objects], *, class_agnostic: bool) -> tuple[str, ...]:
    """The categories of a detector for this dataset; label 1 is the first.

    Those that the dataset's source names, else those that its objects have, sorted.
    """
    if class_agnostic:
        return (AGNOSTIC,)
    present = {name for item in objects.values() for name in item.categories}
    named = dataset.manifest.source.get("categories") or {}
    return tuple(sorted(present | set(named) if present <= set(named) else present))


def select_images(
    objects: Mapping[str, Objects], *, fraction: float, seed: int, keep_empty: bool = False
) -> np.ndarray:
    """Select the images that a detector is trained on: bool (images,), in the order of `objects`.

    Those with an object to train on; of them, a share by a seeded hash of their ids, so that a smaller fraction's images
    are among a larger one's.
    """
    candidates = np.array([keep_empty or bool(item.trained().any()) for item in objects.values()], dtype=bool)
    if fraction >= 1 or not candidates.any():
        return candidates
    keys = np.array([_hash64(f"fraction:{seed}:{image_id}") for image_id in objects], dtype=np.uint64)
    places = np.flatnonzero(candidates)
    count = max(1, round(fraction * len(places)))
    chosen = np.zeros(len(candidates), dtype=bool)
    chosen[places[np.argsort(keys[places], kind="stable")[:count]]] = True
    return chosen


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
