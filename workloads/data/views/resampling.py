"""Resamples boxes of a batch of images on the device, antialiased and separable (`axis_weights`, `resample`, `crop_boxes`)."""

import torch
from torch import Tensor


def axis_weights(
    start: Tensor, length: Tensor, flip: Tensor, source: int, target: int, span: Tensor | None = None
) -> Tensor:
    """Weights (B, K, target, source) that resample [start, start + length) of one axis to `target` pixels.

    The triangle filter of antialiased bilinear resizing (as Pillow's and torchvision's): its support grows with the
    reduction, and only pixels that the interval touches take part, so the result equals cropping first. With `span`
    (pad), `target` pixels cover that longer interval about the same centre, and those outside [start, start + length) are zero.
    """
    span = length if span is None else span
    first = start + (length - span) / 2
    step = (span / target)[..., None]
    out = torch.arange(target, device=start.device, dtype=torch.float32)
    out = torch.where(flip[..., None], target - 1 - out, out)
    centers = first[..., None] + (out + 0.5) * step
    pixels = torch.arange(source, device=start.device, dtype=torch.float32)
    distance = (pixels + 0.5 - centers[..., None]).abs() / step.clamp(min=1.0)[..., None]
    begin, end = start[..., None, None], (start + length)[..., None, None]
    # Rounding of an interval's end must not add a pixel.
    touched = (pixels + 1 > begin + 1e-3) & (pixels < end - 1e-3)
    weights = (1 - distance).clamp_(min=0) * touched
    inside = (centers > start[..., None]) & (centers < (start + length)[..., None])
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) * inside[..., None]


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, 3, H, W) by rows (B, K, h, H) and columns (B, K, w, W) to (B, K, 3, h, w)."""
    b, channels, height, width = images.shape
    k, h = rows.shape[1], rows.shape[2]
    by_row = images.permute(0, 2, 1, 3).reshape(b, height, channels * width)
    tall = torch.bmm(rows.reshape(b, k * h, height), by_row)
    out = torch.bmm(tall.reshape(b * k, h * channels, width), columns.flatten(0, 1).transpose(1, 2))
    return out.reshape(b, k, h, channels, -1).transpose(2, 3)


def crop_boxes(images: Tensor, boxes_xyxy: Tensor, size: int) -> Tensor:
    """Each image's box, stretched to a square, antialiased: float32 (B, 3, size, size) in [0, 1].

    Args:
        images: uint8 (B, 3, H, W). boxes_xyxy: float (B, 4), pixels of the canvas, not empty.
    """
    box = boxes_xyxy.float()[:, None].to(images.device)
    upright = torch.zeros_like(box[..., 0], dtype=torch.bool)
    rows = axis_weights(box[..., 1], box[..., 3] - box[..., 1], upright, images.shape[2], size)
    columns = axis_weights(box[..., 0], box[..., 2] - box[..., 0], upright, images.shape[3], size)
    return resample(images.to(torch.float32).div_(255.0), rows, columns)[:, 0]
