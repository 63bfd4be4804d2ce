"""A dataset and an experiment small enough that a run takes seconds."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.datasets.build import build_dataset
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig

EXPERIMENT = """
name: tiny
steps: 20
global_batch_size: 8
log_every: 5
checkpoint_every: 10
checkpoint_epochs: null
channels_last: false
data: {{uri: {train}, decode_size: 64, decode_threads: 1, io_threads: 1}}
views: {{full_size: 64, crop_size: 32, crops_per_image: 2}}
backbone: {{norm: group}}
objective: {{kind: anchor_ntxent, levels: [P3], projection_dim: 16, projector_hidden: 16}}
optimizer: {{kind: adamw, lr: 1e-3}}
evaluation:
  uri: {heldout}
  heatmaps: 1
  protocol:
    {{view_size: 64, crop_size: 32, grid: 8, levels: [P3], crops_per_image: 2, untrained_networks: 1, bootstrap: 100,
      pixel_windows: [16]}}
scaling: {{num_workers: {workers}, cpus_per_worker: 1, poll_interval_s: 0.1}}
tracking: {{system_metrics: false}}
storage: {{path: {output}}}
failure: {{retries: 0}}
"""


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`train` and `selection` (24 images each), `heldout` (6): quarters of noise of different grain, so that there is something to find."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    uris = {}
    for name, count in (("train", 24), ("heldout", 6), ("selection", 24)):
        folder = root / f"{name}-images"
        folder.mkdir()
        for index in range(count):
            quarters = [np.kron(rng.integers(0, 255, (48 // g, 48 // g, 3)), np.ones((g, g, 1))) for g in (2, 4, 8, 16)]
            pixels = np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)], 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")
        uris[name] = str(root / name)
        build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(folder),)), output=uris[name]))
    return uris


@pytest.fixture
def experiment(tmp_path: Path, datasets: dict[str, str]) -> Path:
    """An experiment file for one worker; its output folder is `tmp_path / "runs"`."""
    return write_experiment(tmp_path, datasets, workers=1)


def write_experiment(folder: Path, datasets: dict[str, str], *, workers: int) -> Path:
    """Write the experiment file and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(EXPERIMENT.format(**datasets, workers=workers, output=folder / "runs"))
    return path


@pytest.fixture(autouse=True, scope="module")
def no_tracking_address_left() -> Iterator[None]:
    """Undo `mlflow.set_tracking_uri`, which is global to the process and sets a variable: the next file's tests must not log there."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
