"""What tests of several packages share."""

from pathlib import Path

import pytest

from orchestrator.datasets.build import build_dataset
from tests.workloads.data.images import make_coco
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import CocoSourceConfig


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`train` and `val`: 16 images each with their objects as shards; `train_panoptic` and `val_panoptic`: the masks."""
    root = tmp_path_factory.mktemp("coco")
    found: dict[str, str] = {}
    for name, first in (("train", 1), ("val", 101)):
        folder: Path = make_coco(root / name, first=first)
        source = CocoSourceConfig(inputs=(str(folder / "images"),), annotations=str(folder / "instances.json"))
        build_dataset(BuildConfig(source=source, output=str(root / f"{name}-shards"), row_group_bytes=60_000))
        found |= {name: str(root / f"{name}-shards"), f"{name}_panoptic": str(folder / "panoptic.json")}
    return found
