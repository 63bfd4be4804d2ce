"""`read_annotations`: labels, sizes and objects of a dataset's images, without decoding any."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.store.manifest import Dataset
from workloads.data.store.row_groups import damaged_shard


@dataclass(frozen=True, slots=True)
class Annotations:
    """Label, size and objects of one image."""

    label: str | None
    size_hw: tuple[int, int]  # pixels, upright
    boxes_xyxy: np.ndarray  # float32 (n, 4), pixels of the upright source image
    categories: tuple[str, ...]
    crowd: np.ndarray  # bool (n,): COCO's flag
    difficult: np.ndarray  # bool (n,): VOC's flag


def read_annotations(dataset: Dataset) -> dict[str, Annotations]:
    """Read the annotations of every image, by image id.

    Raises:
        DataError: a shard cannot be read.
    """
    annotations: dict[str, Annotations] = {}
    for shard in range(len(dataset.manifest.shards)):
        try:
            annotations |= _read_shard(dataset, shard)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:  # damaged in any of its parts
            raise damaged_shard(dataset, shard, error) from None
    return annotations


def _read_shard(dataset: Dataset, shard: int) -> dict[str, Annotations]:
    table = pq.read_table(
        dataset.shard_path(shard),
        filesystem=dataset.filesystem,
        columns=["image_id", "width", "height", "label", "objects"],
        page_checksum_verification=True,
    )
    return {row["image_id"]: _annotations(row) for row in table.to_pylist()}


def _annotations(row: dict[str, Any]) -> Annotations:
    objects = row["objects"] or []
    xywh = np.array([item["bbox"] for item in objects], dtype=np.float32).reshape(-1, 4)
    return Annotations(
        label=row["label"],
        size_hw=(row["height"], row["width"]),
        boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        categories=tuple(item["category"] for item in objects),
        crowd=np.array([item["crowd"] for item in objects], dtype=bool),
        difficult=np.array([bool(item.get("difficult")) for item in objects], dtype=bool),
    )
