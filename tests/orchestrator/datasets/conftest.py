"""A folder of images, its build config, and a reader of shards for the tests of datasets."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.workloads.data.images import make_folder
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig

SMALL = {"rows_per_shard": 10, "row_group_bytes": 6000}


def folder_build(source: Path, output: Path, **options) -> BuildConfig:
    """The config of a build of the folder `source`."""
    return BuildConfig(source=FolderSourceConfig(inputs=(str(source),)), output=str(output), **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """32 images in four classes."""
    return make_folder(tmp_path / "images", per_class=8)


def read_images(folder: Path) -> dict[str, bytes]:
    """Image id → encoded bytes, of all shards in `folder`."""
    rows = [row for path in folder.glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["image_id"]: row["image"]["bytes"] for row in rows}
