"""Renders two augmented views of each image on the device (`make_pair_views`), with their regions and patches where configured."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workloads.config import config
from workloads.data.views.cells import grid_regions, pool_regions, source_pixels
from workloads.data.views.counter_random import stream, uniform
from workloads.data.views.crops import Share, grey, jitter_colours
from workloads.data.views.photometric import DRAWS, PhotometricConfig, change_colours
from workloads.data.views.resampling import axis_weights, resample
from workloads.errors import ConfigError
from workloads.types import ImageBatch, PairGeometry, PairViews

_BOX_DRAWS = 5  # area, aspect, left, top, mirrored
_PATCH_DRAWS = 10  # two for the place, six for the colours, grey, order


@config
class GridRegionsConfig:
    """Regions that are the cells of a grid over the image."""

    kind: Literal["grid"] = "grid"
    """Source of the regions."""
    size: Annotated[int, Field(ge=1, le=64)] = 5
    """Cells on each side."""


@config
class ColumnRegionsConfig:
    """Regions that `data build regions=[…]` has stored with the images."""

    kind: Literal["column"] = "column"
    """Source of the regions."""
    name: str
    """Name of the column, without its prefix: felzenszwalb, slic, panoptic, grid, or one of your own."""


@config
class PatchesConfig:
    """Small pieces of each view (arXiv 1912.01991, section 3.3; DetCo's local views)."""

    grid: Annotated[int, Field(ge=2, le=5)] = 3
    """Cells on each side; every cell gives one patch, in random order."""
    view_size: Annotated[int, Field(ge=32)] = 255
    """Side of the square that is cut into cells, pixels."""
    size: Annotated[int, Field(ge=8)] = 64
    """Side of a patch, pixels; its position within the cell is random."""
    area: tuple[Share, Share] = (0.6, 1.0)
    """Least and largest share of the image that the cut square covers."""

    def __post_init__(self) -> None:
        if self.size > self.view_size // self.grid:
            cell = self.view_size // self.grid
            raise ConfigError(
                f"views.patches.size: {self.size} does not fit into a cell of {cell} pixels; use at most {cell}, or a larger "
                "views.patches.view_size"
            )


@config
class PairViewsConfig:
    """Size and augmentation of two views of an image (arXiv 2002.05709, as in arXiv 2103.10957)."""

    kind: Literal["pair"] = "pair"
    """Kind of views; pair is for ntxent, detcon and detco."""
    view_size: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the square views, pixels."""
    area: tuple[Share, Share] = (0.08, 1.0)
    """Least and largest share of the image that a view covers."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest ratio of width to height, drawn evenly in its logarithm; a side longer than the image is cut to it."""
    horizontal_flip: Share = 0.5
    """Share of the views that are mirrored left to right."""
    colours: PhotometricConfig = PhotometricConfig()
    regions: Annotated[GridRegionsConfig | ColumnRegionsConfig, Field(discriminator="kind")] | None = None
    """Image regions that are mapped into the views; null: none (detcon needs them)."""
    patches: PatchesConfig | None = None
    """Patches in addition to the views; null: none (detco needs them)."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect)):
            if not 0 < low <= high:
                raise ConfigError(f"views.{name}: expected 0 < least <= largest, given {[low, high]}")

    @property
    def regions_column(self) -> str | None:
        """The column that the loader must read, or None."""
        return self.regions.name if isinstance(self.regions, ColumnRegionsConfig) else None

    @property
    def input_size(self) -> int:
        """Side of a view, pixels."""
        return self.view_size

    @property
    def views_per_image(self) -> int:
        """Images that go through the trunk for each image of the batch."""
        return 2 + (2 * self.patches.grid**2 if self.patches is not None else 0)


def make_pair_views(batch: ImageBatch, settings: PairViewsConfig, *, seed: int) -> PairViews:
    """Draw and render the two views of every image of `batch` on its device.

    Every draw is a function of (seed, epoch, position), so that views do not depend on the number of workers.
    """
    size = settings.view_size
    draws = uniform(stream(seed, "pair", batch.epoch), batch.positions, 2 * (_BOX_DRAWS + DRAWS))
    draws = draws.unflatten(-1, (2, _BOX_DRAWS + DRAWS))
    box = _draw_boxes(draws[..., :4], batch.content_hw, settings.area, settings.aspect)
    mirrored = draws[..., 4] < settings.horizontal_flip
    images = batch.images.to(torch.float32).div_(255.0)
    views = _render(images, box, mirrored, size)
    regions, num_regions = _regions(batch, box, mirrored, settings)
    return PairViews(
        images=change_colours(views, draws[..., _BOX_DRAWS:], settings.colours),
        geometry=PairGeometry(box_xyxy=box, flips=torch.stack([mirrored, torch.zeros_like(mirrored)], dim=-1)),
        valid=batch.valid,
        positions=batch.positions,
        epoch=batch.epoch,
        regions=regions,
        num_regions=num_regions,
        patches=_patches(batch, images, settings, seed) if settings.patches is not None else None,
    )


def _draw_boxes(draws: Tensor, content_hw: Tensor, area: tuple[float, float], aspect: tuple[float, float]) -> Tensor:
    """Boxes (B, V, 4) xyxy in canvas pixels from four draws each, (B, V, 4)."""
    height, width = (side[:, None] for side in content_hw.to(torch.float32).unbind(1))
    covered = (area[0] + draws[..., 0] * (area[1] - area[0])) * height * width
    ratio = torch.exp(math.log(aspect[0]) + draws[..., 1] * (math.log(aspect[1]) - math.log(aspect[0])))
    w = torch.minimum((covered * ratio).sqrt(), width)
    h = torch.minimum((covered / ratio).sqrt(), height)
    left, top = draws[..., 2] * (width - w), draws[..., 3] * (height - h)
    return torch.stack([left, top, left + w, top + h], dim=-1)


def _render(images: Tensor, box: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) to their views (B, V, 3, size, size)."""
    x0, y0, x1, y1 = box.unbind(-1)
    upright = torch.zeros_like(mirrored)
    rows = axis_weights(y0, y1 - y0, upright, images.shape[2], size)
    columns = axis_weights(x0, x1 - x0, mirrored, images.shape[3], size)
    return resample(images, rows, columns)


def _regions(batch: ImageBatch, box: Tensor, mirrored: Tensor, settings: PairViewsConfig) -> tuple[Tensor | None, int]:
    """Region of each 32-pixel cell of each view, int64 (B, 2, g, g), and the highest possible number."""
    if settings.regions is None:
        return None, 0
    size = settings.view_size
    y = source_pixels(box[..., 1], box[..., 3], torch.zeros_like(mirrored), size, batch.content_hw[:, :1])
    x = source_pixels(box[..., 0], box[..., 2], mirrored, size, batch.content_hw[:, 1:])
    match settings.regions:
        case GridRegionsConfig(size=grid):
            pixels, highest = grid_regions(y, x, batch.content_hw, grid), grid * grid
        case ColumnRegionsConfig():
            if batch.regions is None:
                raise ValueError(f"batch.regions: the loader did not read the column {settings.regions.name}")
            image = torch.arange(len(y), device=y.device)[:, None, None, None]
            pixels = batch.regions[image, y[..., :, None], x[..., None, :]].long()
            highest = batch.num_regions
    cells = pool_regions(pixels.flatten(0, 1), size // 32, highest)
    return cells.unflatten(0, (-1, 2)), highest


def _patches(batch: ImageBatch, images: Tensor, settings: PairViewsConfig, seed: int) -> Tensor:
    """Two sets of grid × grid patches an image, (B, 2, P, 3, size, size), shuffled within each set."""
    patches = settings.patches
    assert patches is not None
    count, cell = patches.grid**2, patches.view_size / patches.grid
    draws = uniform(stream(seed, "patches", batch.epoch), batch.positions, 2 * (_BOX_DRAWS + count * _PATCH_DRAWS))
    draws = draws.unflatten(-1, (2, -1))
    box = _draw_boxes(draws[..., :4], batch.content_hw, patches.area, settings.aspect)
    mirrored = draws[..., 4] < settings.horizontal_flip
    each = draws[..., _BOX_DRAWS:].unflatten(-1, (count, _PATCH_DRAWS))
    index = torch.arange(count, device=draws.device)
    corner = torch.stack([index % patches.grid, index // patches.grid], dim=-1) * cell
    corner = corner + each[..., :2] * (cell - patches.size)
    # From pixels of the cut square to pixels of the image. Mirroring permutes the cells, which the shuffling makes irrelevant.
    scale = (box[..., 2:] - box[..., :2])[..., None, :] / patches.view_size
    low = box[..., None, :2] + corner * scale
    boxes = torch.cat([low, low + patches.size * scale], dim=-1).flatten(1, 2)
    flips = mirrored[..., None].expand(-1, -1, count).flatten(1, 2)
    rendered = _render(images, boxes, flips, patches.size)
    colours = each.flatten(1, 2)
    rendered = jitter_colours(rendered, colours[..., 2:8], settings.colours.jitter)
    to_grey = (colours[..., 8] < settings.colours.grey)[..., None, None, None]
    rendered = torch.where(to_grey, grey(rendered), rendered).unflatten(1, (2, count))
    order = each[..., 9].argsort(dim=-1)[..., None, None, None]
    return rendered.gather(2, order.expand_as(rendered))
