"""Renders the full view and K small crops of each image on the device (`make_views`), by one antialiased resampling each."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workloads.config import config
from workloads.data.views.counter_random import stream, uniform
from workloads.data.views.resampling import axis_weights, resample
from workloads.errors import ConfigError
from workloads.types import CropGeometry, ImageBatch, Views

Share = Annotated[float, Field(ge=0, le=1)]
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as torchvision's rgb_to_grayscale


@config
class JitterConfig:
    """Colour jitter of a crop; strengths have the meaning of torchvision's ColorJitter."""

    share: Share = 0.5
    """Share of the crops whose colours are jittered."""
    brightness: Share = 0.4
    """The brightness factor is drawn from 1 ± this."""
    contrast: Share = 0.4
    """The contrast factor is drawn from 1 ± this."""
    saturation: Share = 0.4
    """The saturation factor is drawn from 1 ± this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The hue is rotated by up to ± this share of the colour circle."""
    grey: Share = 0.2
    """Share of the jittered crops that become grey."""


@config
class ViewsConfig:
    """Sizes and augmentation of the full view and its crops (arXiv 2402.13465, section 3)."""

    kind: Literal["crops"] = "crops"
    """Kind of views; crops is for anchor_ntxent."""
    full_size: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    """Side of the square full view, pixels; the image is stretched to it."""
    crop_size: Annotated[int, Field(ge=16)] = 64
    """Side of the square that a crop is resampled to, pixels."""
    crops_per_image: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of crops of each full view."""
    crop_scale: tuple[Share, Share] = (0.10, 0.25)
    """Least and largest side of a crop, as a share of the image's longer side; width and height are drawn independently."""
    crop_fit: Literal["stretch", "pad"] = "stretch"
    """stretch: a crop fills the square; pad: it keeps its aspect ratio, and the rest of the square is zero."""
    horizontal_flip: Share = 0.5
    """Share of crops, and independently of full views, that are mirrored left to right."""
    vertical_flip: Share = 0.5
    """Share of crops, and independently of full views, that are mirrored top to bottom."""
    jitter: JitterConfig = JitterConfig()

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ConfigError(f"views.crop_scale: expected 0 < least <= largest, given {list(self.crop_scale)}")

    @property
    def regions_column(self) -> None:
        """None: crops need no regions."""
        return None

    @property
    def views_per_image(self) -> int:
        """Images that go through a trunk for each image of the batch."""
        return 1 + self.crops_per_image

    @property
    def input_size(self) -> int:
        """Side of the full view, pixels."""
        return self.full_size


@dataclass(frozen=True, slots=True)
class _Placement:
    """Crops in pixels of the canvas: (B, K) each."""

    left: Tensor
    top: Tensor
    width: Tensor
    height: Tensor


def make_views(batch: ImageBatch, settings: ViewsConfig, *, seed: int) -> Views:
    """Draw and render the training views of `batch` on its device.

    Every draw is a function of (seed, epoch, position), so that views do not depend on the number of workers.
    """
    return render_views(batch, settings, keys=batch.positions, stream_id=stream(seed, "views", batch.epoch))


def render_views(batch: ImageBatch, settings: ViewsConfig, *, keys: Tensor, stream_id: int) -> Views:
    """Render the views of `batch` from draws keyed by `keys`, int64 (B,)."""
    size, count = settings.full_size, settings.crops_per_image
    draws = uniform(stream_id, keys, 2 + 12 * count)
    full_flips = _flips(draws[:, :2], settings)
    per_crop = draws[:, 2:].reshape(-1, count, 12)
    crop_flips = _flips(per_crop[..., 4:6], settings)
    placement = _place_crops(per_crop[..., :4], batch.content_hw, settings.crop_scale)

    images = batch.images.to(torch.float32).div_(255.0)
    content = batch.content_hw.to(torch.float32)
    zero = torch.zeros_like(content[:, :1])
    full = resample(
        images,
        axis_weights(zero, content[:, :1], full_flips[:, None, 1], images.shape[2], size),
        axis_weights(zero, content[:, 1:], full_flips[:, None, 0], images.shape[3], size),
    )[:, 0]
    square = torch.maximum(placement.width, placement.height) if settings.crop_fit == "pad" else None
    crops = resample(
        images,
        axis_weights(placement.top, placement.height, crop_flips[..., 1], images.shape[2], settings.crop_size, square),
        axis_weights(placement.left, placement.width, crop_flips[..., 0], images.shape[3], settings.crop_size, square),
    )
    crops = jitter_colours(crops, per_crop[..., 6:12], settings.jitter)
    return Views(
        full=full,
        crops=crops,
        geometry=CropGeometry(
            box_xyxy=_boxes_in_full_view(placement, content, full_flips, size),
            crop_flips=crop_flips,
            full_flips=full_flips,
            full_size_hw=(size, size),
            crop_size_hw=(settings.crop_size, settings.crop_size),
        ),
        valid=batch.valid,
        positions=batch.positions,
        epoch=batch.epoch,
    )


def _flips(draws: Tensor, settings: ViewsConfig) -> Tensor:
    """bool (..., 2) from draws (..., 2): whether a view is mirrored (horizontally, vertically)."""
    # Column by column: a tensor of the two shares would be copied to the device, which the host waits for.
    return torch.stack([draws[..., 0] < settings.horizontal_flip, draws[..., 1] < settings.vertical_flip], dim=-1)


def _place_crops(draws: Tensor, content_hw: Tensor, scale: tuple[float, float]) -> _Placement:
    """Crops from four draws each, (B, K, 4), inside images of `content_hw` (B, 2)."""
    height, width = content_hw.to(torch.float32).unbind(1)
    longer = torch.maximum(height, width)[:, None]
    crop_width = torch.minimum((scale[0] + draws[..., 0] * (scale[1] - scale[0])) * longer, width[:, None])
    crop_height = torch.minimum((scale[0] + draws[..., 1] * (scale[1] - scale[0])) * longer, height[:, None])
    left = draws[..., 2] * (width[:, None] - crop_width)
    top = draws[..., 3] * (height[:, None] - crop_height)
    return _Placement(left, top, crop_width, crop_height)


def _boxes_in_full_view(placement: _Placement, content: Tensor, full_flips: Tensor, size: int) -> Tensor:
    """(B, K, 4) xyxy in pixels of the full view after its flips."""
    to_x, to_y = size / content[:, 1:], size / content[:, :1]
    x0, x1 = placement.left * to_x, (placement.left + placement.width) * to_x
    y0, y1 = placement.top * to_y, (placement.top + placement.height) * to_y
    mirrored_x, mirrored_y = full_flips[:, :1], full_flips[:, 1:]
    x0, x1 = torch.where(mirrored_x, size - x1, x0), torch.where(mirrored_x, size - x0, x1)
    y0, y1 = torch.where(mirrored_y, size - y1, y0), torch.where(mirrored_y, size - y0, y1)
    return torch.stack([x0, y0, x1, y1], dim=-1).clamp(0, size)


def jitter_colours(crops: Tensor, draws: Tensor, settings: JitterConfig) -> Tensor:
    """Brightness, contrast, saturation, hue, then grey, in this order.

    Args:
        crops: float32 (B, K, 3, h, w) in [0, 1].
        draws: float32 (B, K, 6) in [0, 1): whether at all, four strengths, whether grey.
    """
    if settings.share == 0:
        return crops
    per_view = draws[..., None, None, None]

    def factor(draw: int, strength: float) -> Tensor:
        return 1 + (2 * per_view[:, :, draw] - 1) * strength

    jittered = (crops * factor(1, settings.brightness)).clamp_(0, 1)
    mean = grey(jittered).mean((-3, -2, -1), keepdim=True)
    jittered = torch.lerp(mean, jittered, factor(2, settings.contrast)).clamp_(0, 1)
    jittered = torch.lerp(grey(jittered), jittered, factor(3, settings.saturation)).clamp_(0, 1)
    if settings.hue > 0:
        jittered = _rotate_hue(jittered, (factor(4, 2 * settings.hue) - 1) * torch.pi).clamp_(0, 1)
    jittered = torch.where(per_view[:, :, 5] < settings.grey, grey(jittered), jittered)
    return torch.where(per_view[:, :, 0] < settings.share, jittered, crops)


def grey(images: Tensor) -> Tensor:
    """Luma of images (..., 3, h, w) as (..., 1, h, w)."""
    red, green, blue = images.unbind(-3)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).unsqueeze(-3)


def _rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate chroma by `angle` radians in the YIQ plane: hue changes, luma does not; linear, unlike a trip through HSV."""
    luma = grey(images).squeeze(-3)
    red, green, blue = images.unbind(-3)
    i = 0.595716 * red - 0.274453 * green - 0.321263 * blue
    q = 0.211456 * red - 0.522591 * green + 0.311135 * blue
    cos, sin = torch.cos(angle).squeeze(-3), torch.sin(angle).squeeze(-3)
    i, q = cos * i - sin * q, sin * i + cos * q
    return torch.stack(
        [luma + 0.9563 * i + 0.6210 * q, luma - 0.2721 * i - 0.6474 * q, luma - 1.1070 * i + 1.7046 * q], dim=-3
    )
