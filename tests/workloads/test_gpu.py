"""On a CUDA device: every objective's losses are the CPU's, no steady step or snapshot waits for the device, bf16 is finite.

Run with `pytest -m gpu tests/workloads`; needs neither Ray nor MLflow.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.workloads.test_copies import OBJECTIVES, labelled_of, settings_of
from workloads.data.loading.upload import Upload
from workloads.data.views.detection import DetectionViewsConfig, make_detection_views
from workloads.loops.meter import Meter
from workloads.loops.pretrain import _update
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.models.detector import Detector, DetectorConfig
from workloads.spec.factory import build_objective
from workloads.spec.optim import make_optimizer
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CheckpointMeta, take_snapshot
from workloads.types import ImageBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SGD = {"optimizer": {"kind": "sgd", "lr": 0.01}}
STEPS = 10
TOLERANCE = 1e-3
"""Relative, of a loss in float32 without TF32: the order of summation differs, and norms over few values amplify that."""


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch_of(step: int, *, pinned: bool = False) -> ImageBatch:
    generator = torch.Generator().manual_seed(step)
    batch = ImageBatch.of(torch.randint(0, 255, (8, 3, 96, 96), dtype=torch.uint8, generator=generator), epoch=step)
    if not pinned:
        return batch
    names = ("images", "content_hw", "source_hw", "positions", "valid")
    return dataclasses.replace(batch, **{name: getattr(batch, name).contiguous().pin_memory() for name in names})


class Run:
    """An objective and its optimiser on a device."""

    def __init__(self, settings: PretrainConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.settings, self.device = settings, device
        self.objective: nn.Module = build_objective(settings).to(device).train()
        self.optimizer = make_optimizer(self.objective, settings.optimizer)
        self.upload = Upload(device)
        self.meter = Meter(loader=None, remedy="")  # type: ignore[arg-type]

    def step(self, number: int, batch: ImageBatch) -> dict[str, torch.Tensor]:
        metrics = _update(
            self.objective, self.objective, self.optimizer, self.upload(batch), self.settings, self.device
        )
        self.objective.after_update(number, STEPS)  # type: ignore[operator]
        self.meter.add(batch, metrics, 0.0)
        return metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_ten_steps_are_the_cpus(name: str) -> None:
    """Each step begins with the CPU's weights and queues: two trainings in float32 drift apart like any chaotic system."""
    settings = settings_of(name, **SGD)
    on_cpu, on_gpu = Run(settings, CPU), Run(settings, GPU)
    for step in range(STEPS):
        on_gpu.objective.load_state_dict(on_cpu.objective.state_dict())
        expected, found = (float(run.step(step, batch_of(step))["train/loss"]) for run in (on_cpu, on_gpu))
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-5), f"step {step}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_steady_step_and_a_snapshot_wait_for_nothing(name: str) -> None:
    run = Run(settings_of(name), GPU)
    batches = [batch_of(step, pinned=True) for step in range(4)]
    for step in range(3):
        run.step(step, batches[step])
    with no_waiting():
        run.step(3, batches[3])
    with no_waiting():
        take_snapshot(
            model=run.objective,
            optimizer=run.optimizer,
            window=run.meter.window(),
            config_yaml="",
            meta=CheckpointMeta(step=4, config_sha256="", manifest_sha256=""),
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_is_finite(name: str) -> None:
    run = Run(settings_of(name, precision="bf16"), GPU)
    losses = [float(run.step(step, batch_of(step))["train/loss"]) for step in range(STEPS)]
    assert all(math.isfinite(loss) for loss in losses), losses
    assert all(bool(p.isfinite().all()) for p in run.objective.parameters())


def test_a_retinanets_step_waits_for_nothing() -> None:
    torch.manual_seed(0)
    batch, labelled = batch_of(0, pinned=True), labelled_of(batch_of(0))
    detector = Detector(DetectorConfig(fpn_channels=16), Trunk(BackboneConfig()), ("thing", "other")).to(GPU).train()

    def step() -> None:
        settings = DetectionViewsConfig(short_side=96, long_side=96)
        views = make_detection_views(batch, settings, device=GPU, labelled=labelled, seed=0)
        detector(views).loss.backward()

    step()  # copies the anchors' shapes
    with no_waiting():
        step()


def test_detection_views_are_the_cpus() -> None:
    settings = DetectionViewsConfig(short_side=64, long_side=64)
    batch = batch_of(0, pinned=True)
    labelled = labelled_of(batch)
    expected = make_detection_views(batch, settings, device=CPU, labelled=labelled, seed=0)
    found = make_detection_views(batch, settings, device=GPU, labelled=labelled, seed=0)
    torch.testing.assert_close(found.images.cpu(), expected.images, rtol=0, atol=1e-4)
    for a, b in zip(found.targets or [], expected.targets or [], strict=True):
        torch.testing.assert_close(a["boxes"].cpu(), b["boxes"])
