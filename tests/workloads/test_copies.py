"""No steady training step waits for the device: counted on a fake one (`copies.FakeDevice`) that computes real values."""

import numpy as np
import pytest
import torch

from tests.processes import run_on_ranks
from tests.workloads.copies import DEVICE, FakeDevice, module_on_device, on_host
from workloads.config import build
from workloads.data.store.objects import Objects
from workloads.data.views.detection import DetectionViewsConfig, LabelledObjects, make_detection_views
from workloads.loops.pretrain import _update
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.models.detector import Detector, DetectorConfig
from workloads.spec.factory import build_objective
from workloads.spec.optim import make_optimizer
from workloads.spec.pretrain import PretrainConfig
from workloads.types import ImageBatch

PAIR = {"kind": "pair", "view_size": 64}
GRID = {**PAIR, "regions": {"kind": "grid"}}
OBJECTIVES = {
    "anchor_ntxent": {
        "views": {"full_size": 64, "crop_size": 32, "crops_per_image": 2, "jitter": {"hue": 0.1}, "crop_fit": "pad"},
        "objective": {"kind": "anchor_ntxent", "anchor_negatives": 9, "symmetric": True, "crop_grid": 5},
    },
    "ntxent": {"views": PAIR, "objective": {"kind": "ntxent", "projector_hidden": 64}},
    "detcon_s": {
        "views": GRID,
        "objective": {"kind": "detcon", "variant": "S", "projector_hidden": 64},
        "optimizer": {"kind": "lars"},
    },
    "detcon_b": {"views": GRID, "objective": {"kind": "detcon", "variant": "B", "projector_hidden": 64}},
    "detco": {
        "views": {**PAIR, "patches": {"view_size": 96, "size": 32}},
        "objective": {"kind": "detco", "queue_size": 8, "global_hidden": 64, "local_hidden": 64},
    },
}


def settings_of(name: str, **more: object) -> PretrainConfig:
    return build(PretrainConfig, {"global_batch_size": 4, "data": {"uri": "x"}, **OBJECTIVES[name], **more})


def batch_of() -> ImageBatch:
    pixels = torch.randint(0, 255, (4, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch.of(pixels, valid=torch.tensor([True, True, True, False]))


def two_steps(settings: PretrainConfig, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Metrics of two updates; the second is a steady one, with every buffer and queue in use."""
    torch.manual_seed(0)
    objective = build_objective(settings).train()
    if device == DEVICE:
        objective = module_on_device(objective)
    optimizer = make_optimizer(objective, settings.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = False  # torch has no fused update for a fake device
    metrics = []
    for step in range(2):
        batch = batch_of().to(device)
        metrics.append(_update(objective, objective, optimizer, batch, settings, device))
        objective.after_update(step, 10)
    return metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_for_nothing_and_computes_what_the_host_does(name: str):
    settings = settings_of(name, backbone={"norm": "group"} if name == "anchor_ntxent" else {})
    expected = two_steps(settings, torch.device("cpu"))
    with FakeDevice() as fake:
        found = two_steps(settings, DEVICE)
    assert not fake.waits
    for on_cpu, on_fake in zip(expected, found, strict=True):
        for key, value in on_cpu.items():
            torch.testing.assert_close(on_host(on_fake[key]), value)


def sync_batch_on_rank(rank: int, world_size: int) -> list[str]:
    with FakeDevice() as fake:
        two_steps(settings_of("ntxent", backbone={"norm": "sync_batch"}), DEVICE)
    return [f"{place} {what}" for place, what in fake.waits]


def test_statistics_of_the_global_batch_wait_for_nothing(tmp_path):
    assert run_on_ranks(sync_batch_on_rank, 2, tmp_path) == [[], []]


def labelled_of(batch: ImageBatch) -> LabelledObjects:
    objects = Objects(
        size_hw=(96, 96),
        boxes_xyxy=np.array([[4, 4, 60, 70], [20, 30, 50, 90]], dtype=np.float32),
        categories=("thing", "other"),
        crowd=np.zeros(2, dtype=bool),
        difficult=np.zeros(2, dtype=bool),
    )
    return LabelledObjects(objects=dict.fromkeys(batch.image_ids, objects), labels={"thing": 1, "other": 2})


def second_detection_loss(device: torch.device, fake: FakeDevice | None = None) -> torch.Tensor:
    """The loss of the second step; `fake` forgets what the first one waited for, which copies the anchors' shapes."""
    torch.manual_seed(0)
    settings = DetectorConfig(fpn_channels=16, smallest_anchor=8.0)
    detector = Detector(settings, Trunk(BackboneConfig()), ("thing", "other")).train()
    if device == DEVICE:
        detector = module_on_device(detector)
    views_config = DetectionViewsConfig(short_side=64, long_side=64)
    for _ in range(2):
        if fake is not None:
            fake.waits.clear()
        batch = batch_of()
        views = make_detection_views(batch, views_config, device=device, labelled=labelled_of(batch), seed=0)
        loss = detector(views).loss
        loss.backward()
    return loss.detach()


def test_a_retinanets_step_waits_for_nothing():
    expected = second_detection_loss(torch.device("cpu"))
    with FakeDevice() as fake:
        found = second_detection_loss(DEVICE, fake)
    assert not fake.waits
    torch.testing.assert_close(on_host(found), expected)


def test_the_fake_device_sees_what_waits():
    with FakeDevice() as fake:
        x = torch.arange(6.0).to(DEVICE, non_blocking=True)
        x.new_tensor([1.0, 2.0])
        torch.tensor([1.0], device=DEVICE)
        x[x > 2]
        float(x.sum())
        x.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(6)
    assert sorted(what for _, what in fake.waits.elements()) == [
        "device to host",
        "host to device",
        "host to device",
        "index by a mask",
        "read by aten._local_scalar_dense.default",
    ]
