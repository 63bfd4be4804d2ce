"""The batched RetinaNet loss against torchvision's, values and gradients."""

import pytest
import torch
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from workloads.models import retinanet_loss
from workloads.models.retinanet_loss import match

CATEGORIES = 3


@pytest.fixture(scope="module")
def theirs():
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CATEGORIES)


def targets_of(counts: list[int], generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    made = []
    for n in counts:
        corner = torch.rand(n, 2, generator=generator) * 90
        boxes = torch.cat([corner, corner + 2 + torch.rand(n, 2, generator=generator) * 60], dim=1)
        made.append({"boxes": boxes, "labels": torch.randint(0, CATEGORIES, (n,), generator=generator)})
    return made


@pytest.mark.parametrize("counts", [[3, 1, 0, 12], [0, 0], [1], [40, 2, 7]])
def test_it_is_torchvisions(theirs, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(sum(counts))
    targets = targets_of(counts, g)
    levels = [torch.zeros(len(counts), 1, 128 // s, 128 // s) for s in (8, 16, 32, 64, 128)]
    images = ImageList(torch.zeros(len(counts), 3, 128, 128), [(128, 128)] * len(counts))
    anchors = theirs.anchor_generator(images, levels)
    n = len(anchors[0])
    logits = torch.randn(len(counts), n, CATEGORIES, generator=g, requires_grad=True)
    deltas = torch.randn(len(counts), n, 4, generator=g, requires_grad=True)
    outputs = {"cls_logits": logits, "bbox_regression": deltas}
    wanted = theirs.compute_loss(targets, outputs, anchors)
    expected = torch.autograd.grad(sum(wanted.values()), (logits, deltas))
    monkeypatch.setitem(retinanet_loss._LARGEST_MATRIX, "cpu", 2 * max(counts[0], 1) * n)  # several parts
    ours = retinanet_loss.retinanet_loss(logits, deltas, anchors[0], targets)
    gradients = torch.autograd.grad(sum(ours.values()), (logits, deltas))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_matching_by_hand() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 22], [20, 20, 30, 30], [50, 50, 60, 60], [0, 0, 10, 15]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [24, 20, 40, 30]], [[0, 0, 10, 10], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    # The second object overlaps no anchor by .4, so its best one is given to it. Anchor 1 has IoU 10/22 with the first: neither.
    assert match(boxes, valid, anchors).tolist() == [[0, -2, 1, -1, 0], [0, -2, -1, -1, 0]]


def test_half_precision_outputs_give_a_float32_loss(theirs) -> None:
    g = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[0.0, 0, 30, 30], [30, 30, 90, 90]])
    targets = targets_of([2, 0], g)
    logits = torch.randn(2, 2, CATEGORIES, generator=g).bfloat16()
    loss = retinanet_loss.retinanet_loss(logits, torch.randn(2, 2, 4, generator=g).bfloat16(), anchors, targets)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in loss.values())
