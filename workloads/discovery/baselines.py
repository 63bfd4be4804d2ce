"""Computes baseline boxes: complete image, centre, random, Felzenszwalb region, CLS attention."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from workloads.config import config
from workloads.data.views.counter_random import stream, text_keys, uniform
from workloads.discovery.components import FeaturesError, ObjectRegions, box_around, checked, largest_component


@config
class ClsAttentionConfig:
    """The papers' DINO-seg: the largest component of the patches that CLS attends to most."""

    mass: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the attention that the selected patches have together."""
    head: Annotated[int, Field(ge=0)] | None = None
    """Head of the last block, from 0 (the papers use 4 of DINO's six); null: the mean of all heads."""


@config
class CentreConfig:
    """A box in the middle of every image."""

    side: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Sides of the box, as shares of the image's; 0.8 is the best of .5 to .9 on COCO train images."""


@config
class FelzenszwalbConfig:
    """The best region of a graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004), where selective search begins.

    Best without labels: of the regions of at least `least_share`, those that touch the fewest sides of the image, and of
    them the largest.
    """

    long_side: PositiveInt = 256
    """Longer side at which the image is segmented, pixels."""
    scale: PositiveFloat = 300.0
    """Felzenszwalb's scale: larger makes larger regions."""
    sigma: Annotated[float, Field(ge=0)] = 0.8
    """Blur before, pixels."""
    least_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Smallest region of the segmentation, as a share of the image."""


def cls_attention(
    attention: Tensor, grid_hw: tuple[int, int], settings: ClsAttentionConfig | None = None
) -> ObjectRegions:
    """One box an image from the last block's CLS attention, (B, heads, N).

    Raises:
        FeaturesError: wrong shape, not finite, or there is no such head.
    """
    settings = settings or ClsAttentionConfig()
    by_patch = checked(attention.mT, grid_hw)
    heads = by_patch.shape[2]
    if settings.head is not None and settings.head >= heads:
        raise FeaturesError(f"cls_attention.head: there is no head {settings.head}, only 0 to {heads - 1}")
    weights = by_patch.mean(-1) if settings.head is None else by_patch[..., settings.head]
    values, order = weights.sort(dim=1, stable=True)
    selected = (values / values.sum(1, keepdim=True)).cumsum(1) > 1 - settings.mass
    masks = largest_component(torch.zeros_like(selected).scatter_(1, order, selected).unflatten(1, grid_hw))
    return ObjectRegions(
        boxes_xyxy=box_around(masks),
        masks=masks,
        seeds=weights.argmax(1),
        scores=torch.ones(len(weights), device=weights.device),
    )


def whole_image(source_hw: Tensor) -> Tensor:
    """float64 (B, 4): the image itself, xyxy in pixels; `source_hw` int64 (B, 2)."""
    return centre_box(source_hw, 1.0)


def centre_box(source_hw: Tensor, side: float) -> Tensor:
    """float64 (B, 4): a box in the middle whose sides are `side` of the image's, xyxy in pixels."""
    size = source_hw.double().flip(1)
    return torch.cat([size * (1 - side) / 2, size * (1 + side) / 2], dim=1)


def random_box(image_ids: tuple[str, ...], source_hw: Tensor, *, seed: int) -> Tensor:
    """float64 (B, 4): between two uniform points; a function of the image's id and the seed alone."""
    draws = uniform(stream(seed, "random box"), text_keys(image_ids), 4).double().unflatten(1, (2, 2))
    size = source_hw.double().flip(1)
    return torch.cat([draws.amin(1) * size, draws.amax(1) * size], dim=1)


def felzenszwalb_box(image: np.ndarray, settings: FelzenszwalbConfig) -> np.ndarray:
    """float64 (4,): the best region's box, xyxy as shares of the image's sides; `image` uint8 (3, H, W)."""
    from skimage.segmentation import felzenszwalb

    from workloads.data.loading.decode import shrink

    small = shrink(torch.from_numpy(image), settings.long_side).permute(1, 2, 0).numpy()
    least = max(1, round(settings.least_share * small.shape[0] * small.shape[1]))
    regions = felzenszwalb(small, scale=settings.scale, sigma=settings.sigma, min_size=least)
    return best_region(regions, least)


def best_region(regions: np.ndarray, least: int) -> np.ndarray:
    """float64 (4,): box, as shares of the sides, of the region of at least `least` pixels that touches the fewest sides.

    Args:
        regions: int (h, w), ids from 0. Of equals the largest counts, of those the lowest id.
    """
    sizes = np.bincount(regions.ravel())
    touched = np.zeros_like(sizes)
    for side in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        touched[np.unique(side)] += 1
    counted = np.flatnonzero(sizes >= min(least, int(sizes.max())))
    best = counted[np.lexsort((-sizes[counted], touched[counted]))[0]]
    rows, columns = np.nonzero(regions == best)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)
    return box / np.tile(np.array(regions.shape[::-1], dtype=np.float64), 2)
