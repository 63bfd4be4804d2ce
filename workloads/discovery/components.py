"""Finds 4-connected components of a batch of masks (`component_of`, `largest_component`), and the boxes around them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workloads.errors import RunFailedError


class FeaturesError(RunFailedError):
    """Features cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRegions:
    """One region an image, on its grid of h × w cells."""

    boxes_xyxy: Tensor  # int64 (B, 4), cells, half-open
    masks: Tensor  # bool (B, h, w): the component
    seeds: Tensor  # int64 (B,): the cell it was grown from, row by row
    scores: Tensor  # float32 (B,): higher is more like an object; 1 of a method without scores


def labelled(masks: Tensor) -> np.ndarray:
    """int32 (B, h, w): the 4-connected components of bool `masks` (B, h, w), 0 outside; no two images share one."""
    from scipy import ndimage

    # One call for the batch: images are layers of a volume whose neighbourhood does not reach from layer to layer.
    cross = np.zeros((3, 3, 3), dtype=bool)
    cross[1] = ndimage.generate_binary_structure(2, 1)
    return ndimage.label(masks.cpu().numpy(), structure=cross)[0]


def component_of(masks: Tensor, cells: Tensor) -> Tensor:
    """The component of each of `masks`, bool (B, h, w), that holds its cell, int64 (B,); that cell alone where it is not set."""
    b, _, w = masks.shape
    labels = labelled(masks)
    rows, columns = np.divmod(cells.cpu().numpy(), w)
    image = np.arange(b)
    own = labels[image, rows, columns]
    held = (labels == own[:, None, None]) & (labels > 0)
    held[image, rows, columns] = True
    return torch.from_numpy(held).to(masks.device)


def largest_component(masks: Tensor) -> Tensor:
    """The largest component of each of `masks`, bool (B, h, w), of equals the first; empty where no cell is set."""
    labels = labelled(masks)
    sizes = np.bincount(labels.ravel(), minlength=int(labels.max()) + 1)
    sizes[0] = 0
    sized = sizes[labels].reshape(len(labels), -1)
    best = np.take_along_axis(labels.reshape(len(labels), -1), sized.argmax(1)[:, None], axis=1)  # the first of equals
    return torch.from_numpy((labels == best[..., None]) & (labels > 0)).to(masks.device)


def box_around(masks: Tensor) -> Tensor:
    """int64 (B, 4): the half-open box xyxy, in cells, around the set cells of each of `masks`, bool (B, h, w); zeros without any."""
    columns, rows = masks.any(1), masks.any(2)
    low = [line.int().argmax(1) for line in (columns, rows)]
    high = [line.shape[1] - line.flip(1).int().argmax(1) for line in (columns, rows)]
    return torch.stack([*low, *high], dim=1) * masks.flatten(1).any(1, keepdim=True)


def checked(features: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """`features` (B, N, d) of cells row by row, float32 or float64, from whatever precision.

    Raises:
        FeaturesError: not one row a cell, no cell at all, or not finite.
    """
    cells = grid_hw[0] * grid_hw[1]
    if features.dim() != 3 or features.shape[1] != cells or not cells:
        raise FeaturesError(
            f"features of {tuple(features.shape)} are not (images, {grid_hw[0]}·{grid_hw[1]}, channels)"
        )
    features = features if features.dtype == torch.float64 else features.float()
    bad = (~torch.isfinite(features)).flatten(1).any(1)
    if bad.any():
        which = bad.nonzero().flatten().tolist()
        raise FeaturesError(
            f"features of image {which[0]} of the batch ({len(which)} of {len(bad)}) are not finite; "
            "check the trunk's weights, or compute in float32"
        )
    return features
