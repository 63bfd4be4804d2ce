"""Extracts patch features of images of any size (`PatchExtractor`), from transformers and from dilated ResNets."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.discovery.lost import whole_map_norm
from workloads.models.backbone import Trunk, imagenet_normalized
from workloads.models.dilation import dilated
from workloads.models.vit import VitTrunk
from workloads.types import ImageBatch


@dataclass(frozen=True, slots=True)
class PatchFeatures:
    """Features of B images' cells, row by row."""

    features: Tensor  # float32 (B, N, d)
    grid_hw: tuple[int, int]
    cls_attention: Tensor | None  # (B, heads, N), of a transformer


@dataclass(frozen=True, slots=True)
class SizeGroup:
    """The images of a batch that fill the same number of cells."""

    rows: Tensor  # int64 (G,): their places in the batch
    images: Tensor  # float32 (G, 3, h, w), normalised, then padded with zeros to a multiple of the cell


class PatchExtractor(nn.Module):
    """Computes patch features with a trunk: a transformer's last keys, or a ResNet's last map, dilated to `stride`.

    The trunk itself is not changed.
    """

    def __init__(self, trunk: Trunk | VitTrunk, *, stride: int = 16) -> None:
        super().__init__()
        self.trunk = trunk
        self.dense = trunk if isinstance(trunk, VitTrunk) else dilated(trunk, stride)
        self.cell = trunk.patch_size if isinstance(trunk, VitTrunk) else stride
        """Side of a cell, pixels."""

    def forward(self, images: Tensor) -> PatchFeatures:
        """Features of images (B, 3, h, w), normalised, with h and w multiples of the cell."""
        if isinstance(self.dense, VitTrunk):
            last = self.dense.last_attention(images)
            return PatchFeatures(last.keys.float(), last.grid_hw, last.cls_attention.float())
        maps = self.dense(images)["C5"]
        return PatchFeatures(whole_map_norm(maps), (maps.shape[2], maps.shape[3]), None)

    def describe(self, images: Tensor) -> Tensor:
        """One vector an image, float32 (B, D): a transformer's CLS token, or the mean of a ResNet's last map."""
        if isinstance(self.trunk, VitTrunk):
            return self.trunk(images).cls.float()
        return self.trunk(images)["C5"].mean((2, 3)).float()


def same_size_groups(batch: ImageBatch, cell: int) -> Iterator[SizeGroup]:
    """The valid images of `batch`, grouped by size in cells, so that the features of an image do not depend on its batch."""
    cells_hw = (batch.content_hw + cell - 1) // cell
    for size in cells_hw[batch.valid].unique(dim=0):
        rows = ((cells_hw == size).all(1) & batch.valid).nonzero().flatten()
        height, width = (size * cell).tolist()
        images = imagenet_normalized(batch.images[rows, :, :height, :width].float().div_(255.0))
        content = batch.content_hw[rows]
        inside_y = torch.arange(images.shape[2], device=images.device) < content[:, :1]
        inside_x = torch.arange(images.shape[3], device=images.device) < content[:, 1:]
        images *= (inside_y[:, :, None] & inside_x[:, None])[:, None]
        yield SizeGroup(rows, F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2])))


def cells_to_pixels(boxes: Tensor, cell: int, content_hw: Tensor, source_hw: Tensor) -> Tensor:
    """Boxes in cells, int64 (B, 4), as float64 xyxy in pixels of the source image, clipped to the image without padding."""
    content, source = (hw.double().flip(1).repeat(1, 2) for hw in (content_hw, source_hw))
    return torch.minimum(boxes.double() * cell, content) * (source / content)
