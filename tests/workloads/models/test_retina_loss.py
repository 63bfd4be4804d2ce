"""RetinaNet's loss against torchvision's own `compute_loss`: values, gradients, images without boxes, boxes of little overlap."""

import torch
from torchvision.models.detection import RetinaNet

from tests.workloads.models.test_detector import detector_of
from workloads.models.retina_loss import match_anchors, retina_loss


def random_boxes(count: int, smallest: float, largest: float) -> torch.Tensor:
    corner = torch.rand(count, 2) * 100
    return torch.cat([corner, corner + smallest + torch.rand(count, 2) * (largest - smallest)], dim=1)


def test_loss_and_gradients_are_torchvisions():
    network = detector_of("retinanet").network
    assert isinstance(network, RetinaNet)
    torch.manual_seed(3)
    # Small boxes overlap no anchor by half, so that their best ones count; some anchors lie between the thresholds.
    boxes = [random_boxes(6, 15, 60), random_boxes(3, 1, 4), torch.zeros(0, 4), random_boxes(20, 5, 90)]
    targets = [{"boxes": b, "labels": torch.randint(0, 3, (len(b),))} for b in boxes]
    anchors = [random_boxes(500, 10, 70) for _ in boxes]
    kinds = torch.cat([match_anchors(b, a) for b, a in zip(boxes, anchors, strict=True) if len(b)])
    assert (kinds == -2).sum() > 20 and (kinds == -1).sum() > 20 and (kinds >= 0).sum() > 20
    logits, offsets = torch.randn(4, 500, 3), torch.randn(4, 500, 4)

    def with_gradients(loss_of) -> list[torch.Tensor]:
        leaves = [logits.clone().requires_grad_(), offsets.clone().requires_grad_()]
        losses = loss_of(*leaves)
        (losses[0] + 2 * losses[1]).backward()
        return [*losses, *(leaf.grad for leaf in leaves)]

    def theirs(logits: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = network.compute_loss(targets, {"cls_logits": logits, "bbox_regression": offsets}, anchors)
        return losses["classification"], losses["bbox_regression"]

    found = with_gradients(lambda logits, offsets: retina_loss(logits, offsets, anchors, targets))
    for ours, expected in zip(found, with_gradients(theirs), strict=True):
        torch.testing.assert_close(ours, expected)
