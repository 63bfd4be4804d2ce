"""Datasets that several tests read."""

from pathlib import Path

import pytest

from tests.workloads.data.images import make_folder
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.store.manifest import Dataset, open_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "images")


@pytest.fixture(scope="session")
def dataset(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """48 images in 2 shards of several row groups each."""
    from orchestrator.datasets.build import build_dataset

    output = tmp_path_factory.mktemp("dataset")
    build = BuildConfig(
        source=FolderSourceConfig(inputs=(str(folder),)), output=str(output), rows_per_shard=24, row_group_bytes=8000
    )
    build_dataset(build)
    return open_dataset(str(output))
