"""Fixtures that tests of several packages share, and the selection of modules for `-m gpu`."""

from pathlib import Path

import pytest

from tests.workloads.data.images import make_coco


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m gpu`, import only modules with such tests: a GPU machine may lack what the others import."""
    if config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`train` and `val`: 16 images each with their objects as shards; `train_panoptic` and `val_panoptic`: the masks."""
    from orchestrator.datasets.build import build_dataset
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import CocoSourceConfig

    root = tmp_path_factory.mktemp("coco")
    addresses: dict[str, str] = {}
    for name, first in (("train", 1), ("val", 101)):
        folder: Path = make_coco(root / name, first=first)
        source = CocoSourceConfig(inputs=(str(folder / "images"),), annotations=str(folder / "instances.json"))
        build_dataset(BuildConfig(source=source, output=str(root / f"{name}-shards"), row_group_bytes=60_000))
        addresses |= {name: str(root / f"{name}-shards"), f"{name}_panoptic": str(folder / "panoptic.json")}
    return addresses
