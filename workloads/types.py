"""Contains the data types that modules exchange: `ImageBatch`, `Views`, `PairViews`, `StepResult`, `Detections`.

B images, K crops an image, C channels. Boxes are `xyxy` in pixels, half-open, x to the right and y down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """Decoded images of one rank's share of one global batch."""

    images: Tensor  # uint8 (B, 3, H, W), RGB; each image is at the top left of its canvas, the rest is zero
    content_hw: Tensor  # int64 (B, 2): height and width of the image on the canvas, pixels
    source_hw: Tensor  # int64 (B, 2): height and width as stored, before any resize to `decode_size`
    image_ids: tuple[str, ...]
    positions: Tensor  # int64 (B,): index in the epoch's global order
    valid: Tensor  # bool (B,): False where the row did not decode or is padding; it enters no loss or metric
    epoch: int
    regions: Tensor | None = None  # int32 (B, H, W): number of each pixel's region, from 1 in each image; 0: no region
    num_regions: int = 0  # the highest number in `regions`, on the host

    @classmethod
    def of(cls, images: Tensor, **known: Any) -> "ImageBatch":
        """A batch of images without a dataset; fields not in `known` say that each fills its canvas, unresized, and is valid."""
        n = len(images)
        hw = known.get("content_hw", torch.tensor(images.shape[-2:]).expand(n, 2))
        assumed = {
            "content_hw": hw,
            "source_hw": hw,
            "image_ids": tuple(str(i) for i in range(n)),
            "positions": torch.arange(n),
            "valid": torch.ones(n, dtype=torch.bool),
            "epoch": 0,
        }
        return cls(images=images, **assumed | known)

    def to(self, device: Any, *, non_blocking: bool = True) -> "ImageBatch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=non_blocking) for n, t in self._named_tensors()}
        return replace(self, **moved)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [tensor for _, tensor in self._named_tensors()]

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        names = ("images", "content_hw", "source_hw", "positions", "valid", "regions")
        return [(n, tensor) for n in names if (tensor := getattr(self, n)) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CropGeometry:
    """Position of each crop in its image's full view, after all flips."""

    box_xyxy: Tensor  # float32 (B, K, 4): the crop's box in pixels of the full view, after the full view's flips
    crop_flips: Tensor  # bool (B, K, 2): crop mirrored (horizontally, vertically)
    full_flips: Tensor  # bool (B, 2): full view mirrored (horizontally, vertically)
    full_size_hw: tuple[int, int]  # pixels
    crop_size_hw: tuple[int, int]  # pixels

    @property
    def center_xy(self) -> Tensor:
        """float32 (B, K, 2): the crop's centre in pixels of the full view."""
        return (self.box_xyxy[..., :2] + self.box_xyxy[..., 2:]) / 2

    def rows(self, part: slice) -> "CropGeometry":
        """The geometry of some of the images."""
        return replace(self, **{n: getattr(self, n)[part] for n in ("box_xyxy", "crop_flips", "full_flips")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Full views and crops of a batch, the input of anchor NT-Xent: RGB in [0, 1], not normalised."""

    full: Tensor  # float32 (B, 3, h, w)
    crops: Tensor  # float32 (B, K, 3, h', w')
    geometry: CropGeometry
    valid: Tensor  # bool (B,)
    positions: Tensor  # int64 (B,)
    epoch: int

    def rows(self, part: slice) -> "Views":
        """The views of some of the images."""
        tensors = {n: getattr(self, n)[part] for n in ("full", "crops", "valid", "positions")}
        return replace(self, geometry=self.geometry.rows(part), **tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGeometry:
    """Box and flips of each image's two views."""

    box_xyxy: Tensor  # float32 (B, 2, 4): in pixels of the image on the batch's canvas, before the view's flips
    flips: Tensor  # bool (B, 2, 2): view mirrored (horizontally, vertically)

    def rows(self, part: slice) -> "PairGeometry":
        """The geometry of some of the images."""
        return PairGeometry(box_xyxy=self.box_xyxy[part], flips=self.flips[part])


@dataclass(frozen=True, slots=True, kw_only=True)
class PairViews:
    """Two augmented views of each image, RGB in [0, 1], not normalised; regions (DetCon) and patches (DetCo) are optional."""

    images: Tensor  # float32 (B, 2, 3, h, w)
    geometry: PairGeometry
    valid: Tensor  # bool (B,)
    positions: Tensor  # int64 (B,)
    epoch: int
    regions: Tensor | None = None  # int64 (B, 2, g, g): region of each cell of the view's g × g grid; 0: no region
    num_regions: int = 0  # the highest number in `regions`
    patches: Tensor | None = None  # float32 (B, 2, P, 3, h', w'): small pieces of each view, in random order

    def rows(self, part: slice) -> "PairViews":
        """The views of some of the images."""
        tensors = {
            n: value[part]
            for n in ("images", "valid", "positions", "regions", "patches")
            if (value := getattr(self, n)) is not None
        }
        return replace(self, geometry=self.geometry.rows(part), **tensors)


FeaturePyramid = dict[str, Tensor]
"""Level name → (B, C, H/stride, W/stride); `P3` has stride 8, `P4` 16, … `P7` 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Loss and metrics of one rank's share of the global batch."""

    loss: Tensor  # scalar float32; its gradient, averaged over ranks by DDP, is that of the global-batch mean
    metrics: Mapping[str, Tensor]  # detached scalars; already global


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """A detector's detections in one image, by falling score."""

    boxes_xyxy: Tensor  # float32 (n, 4): pixels of the upright source image
    scores: Tensor  # float32 (n,) in [0, 1]
    labels: Tensor  # int64 (n,): 1 is the first category
    masks: Tensor | None = None  # float32 (n, 28, 28): probability of the object within its box
