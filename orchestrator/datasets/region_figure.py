"""Draws a few images of a dataset with their region masks (`draw_regions`)."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from workloads.data.loading.decode import decode_image
from workloads.data.store.manifest import open_dataset
from workloads.data.store.region_codec import PREFIX, decode_regions
from workloads.data.store.row_groups import check_regions, region_columns
from workloads.reports.region_overlays import draw_region_overlays


def draw_regions(uri: str, target: str, *, name: str | None = None, count: int = 8) -> Path:
    """Draw the first `count` images of the dataset at `uri` with the masks of column `name` (default: of all columns).

    Raises:
        DataError: there is no dataset, or it has no such column.
    """
    dataset = open_dataset(uri)
    names = [name] if name is not None else region_columns(dataset)
    for column in names or [""]:
        check_regions(dataset, column)
    rows: list[tuple[str, np.ndarray, dict[str, np.ndarray | None]]] = []
    with dataset.filesystem.open_input_file(dataset.shard_path(0)) as file:
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(count, columns=["image", "image_id", *(PREFIX + n for n in names)]):
            for row in batch.to_pylist()[: count - len(rows)]:
                masks = {n: row[PREFIX + n] for n in names}
                decoded = {n: None if mask is None else decode_regions(mask["bytes"]) for n, mask in masks.items()}
                pixels = decode_image(row["image"]["bytes"]).permute(1, 2, 0).numpy()
                rows.append((row["image_id"], pixels, decoded))
            if len(rows) == count:
                break
    draw_region_overlays(rows, Path(target))
    return Path(target)
