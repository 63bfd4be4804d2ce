"""Renders a batch for a detector (`make_detection_views`): images at one scale on a common canvas, with their boxes and masks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from workloads.config import config
from workloads.data.store.objects import Objects, PanopticMasks
from workloads.data.views.counter_random import stream, uniform
from workloads.data.views.normalization import imagenet_normalized
from workloads.errors import ConfigError
from workloads.types import ImageBatch

_MULTIPLE = 32  # of the canvas' sides, the deepest stage's stride


@config
class DetectionViewsConfig:
    """The size at which a detector sees images, and their augmentation."""

    short_side: Annotated[int, Field(ge=32)] = 800
    """Pixels to which the image's shorter side is resized, aspect kept."""
    long_side: Annotated[int, Field(ge=32)] = 1333
    """Pixels that the longer side may have at most; then the shorter one is less than short_side."""
    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the training images that are mirrored left to right."""

    @property
    def views_per_image(self) -> int:
        """Images that the networks process for each image."""
        return 1

    @property
    def input_size(self) -> int:
        """Typical side of the network's input, pixels."""
        return self.short_side

    def __post_init__(self) -> None:
        if self.long_side < self.short_side:
            raise ConfigError(f"views.long_side: {self.long_side} is less than views.short_side={self.short_side}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionViews:
    """A rendered batch of B images, as a detector's input and, in training, its targets."""

    images: (
        Tensor  # float32 (B, 3, H, W), normalised; each image stands at the top left of its canvas, the rest is zero
    )
    sizes_hw: tuple[tuple[int, int], ...]  # of each image on the canvas, pixels
    scale_xy: Tensor  # float32 (B, 2): canvas pixels per source pixel
    source_hw: tuple[tuple[int, int], ...]  # of each upright source image, pixels
    counted: Tensor  # bool (B,): False for an image that only fills the batch
    targets: list[dict[str, Tensor]] | None = None  # torchvision's: boxes, labels and perhaps masks of each image


def size_in_view(source_hw: tuple[int, int], settings: DetectionViewsConfig) -> tuple[int, int]:
    """The height and width, pixels, at which an image is seen."""
    scale = min(settings.short_side / min(source_hw), settings.long_side / max(source_hw))
    return max(1, round(source_hw[0] * scale)), max(1, round(source_hw[1] * scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledObjects:
    """The objects of a dataset that a detector is trained on."""

    objects: Mapping[str, Objects]  # image id → its objects
    labels: Mapping[str, int]  # category → label; the first is 1
    masks: PanopticMasks | None = None


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where each image lies on the canvas, on the device: tensors (B,) and (B, 2), in pixels."""

    content_hw: Tensor  # float32 (B, 2): of the decoded image
    size_hw: Tensor  # float32 (B, 2): of the image in the view
    scale_xy: Tensor  # float32 (B, 2): canvas pixels per source pixel
    flips: Tensor  # bool (B,): mirrored left to right
    counted: Tensor  # bool (B,)


def make_detection_views(
    batch: ImageBatch,
    settings: DetectionViewsConfig,
    *,
    device: torch.device,
    labelled: LabelledObjects | None = None,
    seed: int | None = None,
) -> DetectionViews:
    """Render the views of a batch that is still on the host, normalised, with targets where objects are given.

    All sizes are known on the host, so that no step waits for the device. Rows that did not decode are left out; if none
    did, the first stays and is not counted.

    Args:
        seed: of the flips; None: no image is flipped.
    """
    rows = torch.nonzero(batch.valid).flatten()
    counted = torch.ones(max(1, len(rows)), dtype=torch.bool)
    if not len(rows):
        rows, counted = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    source = [(max(h, 1), max(w, 1)) for h, w in batch.source_hw[rows].tolist()]
    sizes = [size_in_view(hw, settings) for hw in source]
    flips = torch.zeros(len(rows), dtype=torch.bool)
    if seed is not None:
        draws = uniform(stream(seed, "detection", batch.epoch), batch.positions[rows], 1)[:, 0]
        flips = draws < settings.horizontal_flip
    scale = torch.tensor([[w / sw, h / sh] for (h, w), (sh, sw) in zip(sizes, source, strict=True)])

    is_complete = len(rows) == len(batch.image_ids)
    images = (batch.images if is_complete else batch.images[rows]).to(device, non_blocking=True)
    placement = _placement(batch.content_hw[rows], sizes, scale, flips, counted, device)
    targets = None
    if labelled is not None:
        ids = [batch.image_ids[row] for row in rows.tolist()]
        of_images = [
            labelled.objects[i] if is_counted else None for i, is_counted in zip(ids, counted.tolist(), strict=True)
        ]
        targets = _targets(of_images, labelled.labels, scale, sizes, flips, device)
        if labelled.masks is not None:
            _add_masks(targets, of_images, ids, labelled.masks, sizes, flips, device)
    return DetectionViews(
        images=_render(images, placement, _canvas_hw(sizes)),
        sizes_hw=tuple(sizes),
        scale_xy=placement.scale_xy,
        source_hw=tuple(source),
        counted=placement.counted,
        targets=targets,
    )


def _canvas_hw(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width that hold every image, multiples of 32 pixels."""
    height, width = (_MULTIPLE * math.ceil(max(side) / _MULTIPLE) for side in zip(*sizes, strict=True))
    return height, width


def _placement(
    content_hw: Tensor,
    sizes: Sequence[tuple[int, int]],
    scale: Tensor,
    flips: Tensor,
    counted: Tensor,
    device: torch.device,
) -> _Placement:
    """All of it in one transfer that nothing waits for."""
    columns = [content_hw.float().clamp(min=1), torch.tensor(sizes, dtype=torch.float32), scale]
    table = torch.cat([*columns, flips.float()[:, None], counted.float()[:, None]], dim=1)
    table = table.to(device, non_blocking=True)
    return _Placement(table[:, :2], table[:, 2:4], table[:, 4:6], table[:, 6] > 0, table[:, 7] > 0)


def _render(images: Tensor, placement: _Placement, canvas_hw: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, h, w), normalised; zeros beyond each image."""
    height, width = canvas_hw
    upright = torch.zeros_like(placement.flips)
    content, size = placement.content_hw, placement.size_hw
    rows = _weights(content[:, 0], size[:, 0], upright, images.shape[2], height)
    columns = _weights(content[:, 1], size[:, 1], placement.flips, images.shape[3], width)
    normalised = imagenet_normalized(images.to(torch.float32) / 255)  # before resampling: what lies beyond stays zero
    b, channels, h, w = normalised.shape
    tall = torch.bmm(rows, normalised.permute(0, 2, 1, 3).reshape(b, h, channels * w))
    wide = torch.bmm(tall.reshape(b, height * channels, w), columns.transpose(1, 2))
    return wide.reshape(b, height, channels, width).transpose(1, 2).contiguous(memory_format=torch.channels_last)


def _weights(content: Tensor, target: Tensor, flip: Tensor, source: int, canvas: int) -> Tensor:
    """Weights (B, canvas, source) that resample [0, content) of one axis to the first `target` pixels of the canvas.

    The triangle filter of antialiased bilinear resizing, as in `resampling.axis_weights`, but each image has its own size in the view.
    """
    step = (content / target)[:, None]
    out = torch.arange(canvas, device=content.device, dtype=torch.float32)[None]
    inside = out < target[:, None]
    out = torch.where(flip[:, None], target[:, None] - 1 - out, out)
    centers = (out + 0.5) * step
    pixels = torch.arange(source, device=content.device, dtype=torch.float32)
    distance = (pixels + 0.5 - centers[..., None]).abs() / step.clamp(min=1.0)[..., None]
    weights = (1 - distance).clamp_(min=0) * (pixels < content[:, None, None])
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) * inside[..., None]


def _targets(
    objects: Sequence[Objects | None],
    labels: Mapping[str, int],
    scale: Tensor,
    sizes: Sequence[tuple[int, int]],
    flips: Tensor,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """torchvision's targets: one transfer and one transformation for the boxes of all images."""
    kept = [np.flatnonzero(item.trained()) if item is not None else np.zeros(0, dtype=np.int64) for item in objects]
    counts = [len(places) for places in kept]
    boxes = torch.from_numpy(
        np.concatenate(
            [item.boxes_xyxy[k] for item, k in zip(objects, kept, strict=True) if item is not None]
            or [np.zeros((0, 4), dtype=np.float32)]
        )
    )
    names = [item.categories[k] for item, places in zip(objects, kept, strict=True) if item is not None for k in places]
    image = torch.repeat_interleave(torch.arange(len(objects)), torch.tensor(counts))
    boxes = boxes * scale[image].repeat(1, 2)
    width = torch.tensor([size[1] for size in sizes], dtype=torch.float32)[image]
    mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    boxes = torch.where(flips[image][:, None], mirrored, boxes).to(device, non_blocking=True)
    classes = torch.tensor([labels[name] for name in names], dtype=torch.int64).to(device, non_blocking=True)
    parts = zip(boxes.split(counts), classes.split(counts), strict=True)
    return [{"boxes": b, "labels": c} for b, c in parts]


def _add_masks(
    targets: list[dict[str, Tensor]],
    objects: Sequence[Objects | None],
    ids: Sequence[str],
    masks: PanopticMasks,
    sizes: Sequence[tuple[int, int]],
    flips: Tensor,
    device: torch.device,
) -> None:
    """uint8 (n, H, W) of each image's objects on the canvas, nearest pixel; a panoptic mask is read for each image."""
    canvas = _canvas_hw(sizes)
    for i, (item, (h, w)) in enumerate(zip(objects, sizes, strict=True)):
        grid = np.zeros(canvas, dtype=np.int64)
        segments = np.zeros(0, dtype=np.int64)
        if item is not None and item.segments is not None and len(item.segments):
            segment = masks.ids(ids[i])
            y = ((np.arange(h) + 0.5) * segment.shape[0] / h).astype(np.int64)
            x = ((np.arange(w) + 0.5) * segment.shape[1] / w).astype(np.int64)
            grid[:h, :w] = segment[y[:, None], x[::-1] if bool(flips[i]) else x]
            segments = item.segments[item.trained()]
        on_device = torch.from_numpy(grid).to(device, non_blocking=True)
        wanted = torch.from_numpy(segments).to(device, non_blocking=True)
        targets[i]["masks"] = (on_device[None] == wanted[:, None, None]).to(torch.uint8)
