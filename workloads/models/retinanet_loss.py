"""RetinaNet's loss over a whole batch at once (`retinanet_loss`): matching, focal loss and box loss without a loop over images.

Equal to torchvision's `RetinaNet.compute_loss`, which goes image by image and waits for the device in each of them.
Source: Lin et al., Focal Loss for Dense Object Detection (arXiv 1708.02002), with torchvision's matching thresholds.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, sigmoid_focal_loss

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.4
"""An anchor belongs to the object that it overlaps by the first or more, to the background below the second, else to neither."""

_BACKGROUND, _NEITHER = -1, -2
_LARGEST_MATRIX = {"cpu": 1 << 18}  # IoUs held at a time: on a CPU what its cache holds
_LARGEST_ELSEWHERE = 1 << 26  # 256 MiB


def retinanet_loss(
    logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The loss of each image, normalised by its foreground anchors, averaged over the images.

    Args:
        logits: (B, A, K), one score for each category.
        deltas: (B, A, 4), predicted offsets.
        anchors: float32 (A, 4), xyxy pixels of the canvas, the same for every image.
        targets: of each image `boxes`, float32 (n, 4) in the same pixels, and `labels`, int64 (n,), 0 being the first category.

    Returns:
        `classification` and `bbox_regression`, float32 scalars.
    """
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
    if boxes.shape[1] == 0:  # no image has an object; one empty place keeps the shapes regular
        boxes, labels = boxes.new_zeros(len(targets), 1, 4), labels.new_full((len(targets), 1), -1)
    matched = match(boxes, labels >= 0, anchors)
    foreground = matched >= 0
    per_image = foreground.sum(1).clamp(min=1)
    place = matched.clamp(min=0)

    category = labels.gather(1, place).clamp(min=0)
    wanted = torch.zeros_like(logits, dtype=torch.float32)
    wanted.scatter_(2, category[..., None], foreground[..., None].float())
    focal = sigmoid_focal_loss(logits.float(), wanted).sum(2) * (matched != _NEITHER)

    aim = encode(boxes.gather(1, place[..., None].expand(-1, -1, 4)), anchors)
    # `where` and not a product: what an anchor without an object is encoded to may be infinite.
    distance = torch.where(foreground[..., None], (deltas.float() - aim).abs(), 0.0).sum(2)
    return {
        "classification": (focal.sum(1) / per_image).mean(),
        "bbox_regression": (distance.sum(1) / per_image).mean(),
    }


def match(boxes: Tensor, valid: Tensor, anchors: Tensor) -> Tensor:
    """The object of each anchor, int64 (B, A): its place among the image's boxes; -1 background, -2 neither.

    An anchor that no other overlaps an object more than is given to the object that it overlaps most, however little that
    is (torchvision's `allow_low_quality_matches`).

    Args:
        boxes: float32 (B, G, 4). valid: bool (B, G), false for padding. anchors: float32 (A, 4).
    """
    largest = _LARGEST_MATRIX.get(boxes.device.type, _LARGEST_ELSEWHERE)
    at_once = max(1, largest // (boxes.shape[1] * len(anchors)))
    parts = zip(boxes.split(at_once), valid.split(at_once), strict=True)
    return torch.cat([_match(*part, anchors) for part in parts])


def _match(boxes: Tensor, valid: Tensor, anchors: Tensor) -> Tensor:
    iou = box_iou(boxes.flatten(0, 1), anchors).unflatten(0, boxes.shape[:2])
    iou = iou.masked_fill(~valid[..., None], -1.0)
    most, object_ = iou.max(dim=1)
    matched = object_.masked_fill(most < FOREGROUND_IOU, _NEITHER).masked_fill(most < BACKGROUND_IOU, _BACKGROUND)
    is_best = ((iou == iou.amax(2, keepdim=True)) & valid[..., None]).any(1)
    return torch.where(is_best, object_, matched)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets (…, A, 4) from anchors to boxes: centre in units of the anchor's side, log of the ratio of sides."""
    centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    own_centre, own_side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return torch.cat([(centre - own_centre) / own_side, torch.log(side / own_side)], dim=-1)
