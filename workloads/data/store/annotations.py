"""`read_annotations`: labels, sizes and objects of a dataset's images, without decoding any."""

from dataclasses import dataclass

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
    columns = ["image_id", "width", "height", "label", "objects"]
    for shard in range(len(dataset.manifest.shards)):
        try:
            table = pq.read_table(dataset.shard_path(shard), filesystem=dataset.filesystem, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise damaged_shard(dataset, shard, error) from None
        for row in table.to_pylist():
            objects = row["objects"] or []
            xywh = np.array([item["bbox"] for item in objects], dtype=np.float32).reshape(-1, 4)
            annotations[row["image_id"]] = Annotations(
                label=row["label"],
                size_hw=(row["height"], row["width"]),
                boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
                categories=tuple(item["category"] for item in objects),
                crowd=np.array([item["crowd"] for item in objects], dtype=bool),
                difficult=np.array([bool(item.get("difficult")) for item in objects], dtype=bool),
            )
    return annotations
