"""RetinaNet's loss (`retina_loss`) with masks instead of selections, so that the host never waits for the device.

Equal to torchvision's `RetinaNet.compute_loss`, which selects anchors by boolean index and so reads their number several times an
image.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

_BACKGROUND, _IGNORED = -1, -2
_BACKGROUND_BELOW, _FOREGROUND_FROM = 0.4, 0.5  # IoU, arXiv 1708.02002, section 4


def match_anchors(boxes: Tensor, anchors: Tensor) -> Tensor:
    """int64 (N,): the box of each anchor; -1: background, -2: between background and foreground, ignored.

    An anchor with the largest overlap of some box is foreground whatever the overlap.

    Args:
        boxes: (M, 4) xyxy, M ≥ 1. anchors: (N, 4) xyxy, pixels.
    """
    overlap = box_iou(boxes, anchors)
    largest, index = overlap.max(0)
    matches = index.masked_fill(largest < _FOREGROUND_FROM, _IGNORED)
    matches = matches.masked_fill(largest < _BACKGROUND_BELOW, _BACKGROUND)
    is_best_of_a_box = (overlap == overlap.max(1, keepdim=True).values).any(0)
    return torch.where(is_best_of_a_box, index, matches)


def retina_loss(
    logits: Tensor, offsets: Tensor, anchors: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Focal loss of the categories and L1 loss of the boxes: sums over anchors by the number of foreground ones, means over images.

    Args:
        logits: (B, N, categories). offsets: (B, N, 4), the regression in units of the anchor.
        anchors: of each image, (N, 4) xyxy in pixels.
        targets: of each image, `boxes` (M, 4) xyxy in pixels and `labels` int64 (M,) from 0; M may be 0.
    """
    category_losses, box_losses = [], []
    for image, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if len(boxes) == 0:
            none = torch.zeros_like(logits[image])
            category_losses.append(sigmoid_focal_loss(logits[image], none, reduction="sum"))
            box_losses.append(offsets[image].sum() * 0.0)
            continue
        matches = match_anchors(boxes, anchors[image])
        foreground, box = matches >= 0, matches.clamp(min=0)
        count = foreground.sum().clamp(min=1)
        categories = torch.arange(logits.shape[-1], device=logits.device)
        wanted = (labels[box][:, None] == categories) & foreground[:, None]
        loss = sigmoid_focal_loss(logits[image], wanted.to(logits.dtype), reduction="none")
        category_losses.append(loss.masked_fill((matches == _IGNORED)[:, None], 0.0).sum() / count)
        distance = (offsets[image] - box_offsets(boxes[box], anchors[image])).abs()
        box_losses.append(distance.masked_fill(~foreground[:, None], 0.0).sum() / count)
    return torch.stack(category_losses).mean(), torch.stack(box_losses).mean()


def box_offsets(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(N, 4): shift of the centre in anchor sides and logarithm of the ratio of sides, from anchors to boxes (N, 4) xyxy."""
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    center, anchor_center = boxes[:, :2] + 0.5 * size, anchors[:, :2] + 0.5 * anchor_size
    return torch.cat([(center - anchor_center) / anchor_size, (size / anchor_size).log()], dim=1)
