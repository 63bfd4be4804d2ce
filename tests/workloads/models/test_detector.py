"""Detectors on our trunk: what torchvision's own forward gives, what is frozen, which statistics are used."""

import copy

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from workloads.data.views.detection import DetectionViews
from workloads.models.backbone import BackboneConfig, GlobalBatchNorm2d, Trunk
from workloads.models.detector import Detector, DetectorConfig

KINDS = ("retinanet", "faster_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_fpn")
SMALL = {"fpn_channels": 16, "smallest_anchor": 8.0, "proposals": 32, "region_batch": 16, "score_threshold": 0.0}


def detector_of(kind: str, norm: str = "batch", **more) -> Detector:
    torch.manual_seed(0)
    return Detector(DetectorConfig(kind=kind, **SMALL | more), Trunk(BackboneConfig(norm=norm)), ("cat", "dog", "owl"))


def views_of(count: int = 2, *, masks: bool = False, empty: bool = False) -> DetectionViews:
    torch.manual_seed(1)
    images = torch.rand(count, 3, 64, 96)
    images[0, :, 40:], images[0, :, :, 80:] = 0, 0
    targets = []
    for i in range(count):
        boxes = torch.tensor([[4.0, 6.0, 30.0, 28.0], [20.0, 4.0, 70.0, 38.0]])[: 0 if empty and i == 0 else 2]
        target = {"boxes": boxes, "labels": torch.tensor([1, 3])[: len(boxes)]}
        if masks:
            target["masks"] = torch.zeros(len(boxes), 64, 96, dtype=torch.uint8)
            for mask, box in zip(target["masks"], boxes.long().tolist(), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = 1
        targets.append(target)
    return DetectionViews(
        images=images,
        sizes_hw=((40, 80), *((64, 96),) * (count - 1)),
        scale_xy=torch.tensor([[0.5, 0.5]] * count),
        source_hw=((80, 160), *((128, 192),) * (count - 1)),
        counted=torch.ones(count, dtype=torch.bool),
        targets=targets,
    )


def as_torchvision(detector: Detector) -> torch.nn.Module:
    """The same network with torchvision's own transform, which neither normalises nor resizes here."""
    network = copy.deepcopy(detector.network)
    network.transform = GeneralizedRCNNTransform(64, 96, [0.0] * 3, [1.0] * 3, _skip_resize=True)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_torchvisions_own_forward(kind):
    detector, views = detector_of(kind, statistics="frozen"), views_of(masks=kind.startswith("mask"))
    network = as_torchvision(detector)
    detector.train()
    network.train()
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    if kind.endswith("c4"):
        network.roi_heads.box_head.eval()
    torch.manual_seed(5)
    ours = detector(views)
    torch.manual_seed(5)
    images = [image[:, :h, :w] for image, (h, w) in zip(views.images, views.sizes_hw, strict=True)]
    # Their masks must be as large as their image.
    first = 1 if kind == "retinanet" else 0  # RetinaNet has no background, so its first category is 0
    targets = [
        {k: v[:, :h, :w] if k == "masks" else v - first if k == "labels" else v for k, v in t.items()}
        for t, (h, w) in zip(views.targets, views.sizes_hw, strict=True)
    ]
    theirs = sum(network(images, targets).values())
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-5)
    assert float(ours.metrics["train/loss"]) == pytest.approx(float(theirs.detach()), rel=1e-5)
    ours.loss.backward()
    without = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP waits for every parameter


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_torchvisions_own_forward(kind):
    detector, views = detector_of(kind).eval(), views_of()
    network = as_torchvision(detector).eval()
    network.transform.resize = lambda image, target: (image, target)
    images = [image[:, :h, :w] for image, (h, w) in zip(views.images, views.sizes_hw, strict=True)]
    with torch.no_grad():
        expected = network(images)
    for ours, theirs in zip(detector.detect(views), expected, strict=True):
        assert 0 < len(ours.scores) <= 100 and ours.labels.min() >= 1 and ours.labels.max() <= 3
        torch.testing.assert_close(ours.boxes_xyxy, 2 * theirs["boxes"], rtol=1e-4, atol=1e-3)  # a source pixel is half
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.labels, theirs["labels"] + (kind == "retinanet"))
        assert (ours.masks is not None) == (kind == "mask_rcnn_fpn")
        if ours.masks is not None:
            assert ours.masks.shape == (len(ours.scores), 28, 28)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_objects_and_half_precision_have_a_finite_loss(kind):
    views = views_of(masks=kind.startswith("mask"), empty=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = detector_of(kind).train()(views)
    assert result.loss.dtype == torch.float32 and torch.isfinite(result.loss)
    result.loss.backward()


def test_a_batch_that_does_not_count_has_no_loss_and_no_gradient():
    detector, views = detector_of("retinanet").train(), views_of()
    nothing = DetectionViews(
        images=views.images, sizes_hw=views.sizes_hw, scale_xy=views.scale_xy, source_hw=views.source_hw,
        counted=torch.zeros(2, dtype=torch.bool), targets=views.targets,
    )  # fmt: skip
    result = detector(nothing)
    result.loss.backward()
    assert float(result.loss.detach()) == 0 and all(p.grad.abs().max() == 0 for p in detector.parameters())


@pytest.mark.parametrize(
    ("layers", "trained"), [(0, set()), (2, {"layer3", "layer4"}), (4, {"layer1", "layer2", "layer3", "layer4"})]
)
def test_frozen_layers_keep_weights_and_statistics(layers, trained):
    detector = detector_of("retinanet", trainable_layers=layers).train()
    before = copy.deepcopy(detector.network.backbone.trunk.state_dict())
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    detector(views_of()).loss.backward()
    optimizer.step()
    changed = {
        name.split(".")[1]
        for name, value in detector.network.backbone.trunk.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == trained


def test_all_layers_are_trained_by_default_and_statistics_may_be_frozen_or_global():
    trunk = detector_of("retinanet").network.backbone.trunk
    assert all(p.requires_grad for p in trunk.parameters())
    frozen = detector_of("retinanet", statistics="frozen").train()
    before = frozen.network.backbone.trunk.body.bn1.running_mean.clone()
    frozen(views_of())
    assert torch.equal(frozen.network.backbone.trunk.body.bn1.running_mean, before)
    shared = detector_of("faster_rcnn_c4", statistics="sync_batch")
    norms = [m for m in shared.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(isinstance(m, GlobalBatchNorm2d) for m in norms)


def test_a_detector_can_be_made_again_from_its_state_alone():
    state = detector_of("retinanet", norm="group").state_dict()
    told = state["_extra_state"]
    assert told["categories"] == ["cat", "dog", "owl"] and told["backbone"]["norm"] == "group"
    trunk_keys = {k.removeprefix("network.backbone.trunk.body.") for k in state if ".trunk." in k}
    import torchvision

    plain = torchvision.models.resnet18(norm_layer=lambda c: torch.nn.GroupNorm(32, c))
    assert trunk_keys == {k for k in plain.state_dict() if not k.startswith("fc.")}
