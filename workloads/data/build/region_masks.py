"""`compute_regions`: the region masks that a build stores with an image, one number a pixel, from 1 on, 0 for none."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from workloads.config import config
from workloads.data.store.objects import segment_ids
from workloads.data.store.region_codec import MOST_REGIONS, RegionsError, decode_regions
from workloads.storage.filesystems import read_bytes, resolve_uri


@config
class GridColumnConfig:
    """Regions that are the cells of a grid over the image."""

    size: Annotated[int, Field(ge=1, le=64)] = 5
    """Cells a side."""


@config
class FelzenszwalbColumnConfig:
    """Regions by Felzenszwalb and Huttenlocher's graph-based segmentation (IJCV 2004), as in DetCon, at full resolution."""

    scale: PositiveFloat = 1000.0
    """Scale of observation, as scikit-image defines it; a larger one gives larger regions."""
    sigma: PositiveFloat = 0.8
    """Standard deviation, pixels, of the Gaussian that smooths the image first."""
    min_size: PositiveInt = 1000
    """Size, pixels, below which regions are merged."""


@config
class SlicColumnConfig:
    """Regions that are SLIC superpixels: K-means in colour and position (PAMI 2012)."""

    segments: PositiveInt = 25
    """Approximate number of regions."""
    compactness: PositiveFloat = 10.0
    """Weight of position against colour; a larger one gives squarer regions."""


@config
class PanopticColumnConfig:
    """Regions from COCO's panoptic masks, which people have drawn."""

    masks: str
    """Folder (path or URI) of PNG files, each with its image's name; an image without one has no regions."""


@config
class SourceColumnConfig:
    """Regions from a column of a Parquet source: PNG bytes, or a struct with them, grey of 8 or 16 bits."""

    name: str
    """Name of the column."""


@config
class RegionColumnsConfig:
    """The columns of regions that a build adds; each is named `regions_` and the name of its source."""

    grid: GridColumnConfig | None = None
    felzenszwalb: FelzenszwalbColumnConfig | None = None
    slic: SlicColumnConfig | None = None
    panoptic: PanopticColumnConfig | None = None
    column: SourceColumnConfig | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, without the prefix, in a fixed order."""
        names = [name for name in ("grid", "felzenszwalb", "slic", "panoptic") if getattr(self, name) is not None]
        return (*names, *([self.column.name] if self.column is not None else []))


def compute_regions(
    image: Tensor, path: str, settings: RegionColumnsConfig, read_column: Callable[[], bytes] | None
) -> dict[str, np.ndarray | None]:
    """Compute the regions of one upright image, uint8 (3, H, W): column → int32 (H, W), or None where it has none.

    Args:
        path: of the image within its source; its name is that of the panoptic mask.
        read_column: reads the bytes of the source's column of masks.

    Raises:
        RegionsError: a mask has another size than its image, or is not a mask.
        OSError: a mask cannot be read.
    """
    height, width = image.shape[1:]
    regions: dict[str, np.ndarray | None] = {}
    if settings.grid is not None:
        regions["grid"] = _grid(height, width, settings.grid.size)
    if settings.felzenszwalb is not None:
        from skimage.segmentation import felzenszwalb

        segments = settings.felzenszwalb
        pixels = image.permute(1, 2, 0).numpy()
        regions["felzenszwalb"] = _dense(
            felzenszwalb(pixels, scale=segments.scale, sigma=segments.sigma, min_size=segments.min_size) + 1
        )
    if settings.slic is not None:
        from skimage.segmentation import slic

        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        regions["slic"] = _dense(
            slic(pixels, n_segments=settings.slic.segments, compactness=settings.slic.compactness, start_label=1)
        )
    if settings.panoptic is not None:
        regions["panoptic"] = _panoptic(settings.panoptic, path)
    if settings.column is not None and read_column is not None:
        regions[settings.column.name] = _dense(decode_regions(read_column()))
    for name, ids in regions.items():
        if ids is not None and ids.shape != (height, width):
            raise RegionsError(f"{name} is {ids.shape[1]}x{ids.shape[0]} pixels, the image {width}x{height}")
    return regions


def _grid(height: int, width: int, size: int) -> np.ndarray:
    row = (2 * np.arange(height) + 1) * size // (2 * height)
    column = (2 * np.arange(width) + 1) * size // (2 * width)
    return (1 + row[:, None] * size + column).astype(np.int32)


def _panoptic(settings: PanopticColumnConfig, path: str) -> np.ndarray | None:
    filesystem, root = resolve_uri(settings.masks)
    try:
        data = read_bytes(filesystem, f"{root}/{PurePosixPath(path).stem}.png")
    except FileNotFoundError:
        return None
    try:
        return _dense(segment_ids(data))
    except RegionsError:
        raise
    except Exception as error:  # damaged bytes raise nearly any kind
        raise RegionsError(f"not a readable panoptic mask ({error})") from None


def _dense(ids: np.ndarray) -> np.ndarray:
    """The same regions numbered from 1 without gaps, in the order of their numbers; 0 stays 0.

    Raises:
        RegionsError: more regions than 16 bits can number.
    """
    known, index = np.unique(ids, return_inverse=True)
    if len(known) > MOST_REGIONS:
        raise RegionsError(f"{len(known)} regions are more than {MOST_REGIONS}")
    return (index.reshape(ids.shape) + (0 if known[0] == 0 else 1)).astype(np.int32)
