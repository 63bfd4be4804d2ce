"""Encodes, decodes and resizes region masks, the PNGs of a dataset's `regions_…` columns."""

import io

import numpy as np
from PIL import Image

from workloads.data.store.image_file import open_image
from workloads.errors import RunFailedError

PREFIX = "regions_"
"""Prefix of the name of every column of regions."""

MOST_REGIONS = 65535
"""Largest region number, that of 16 bits."""


class RegionsError(RunFailedError):
    """A region mask cannot be used; the message is the reason."""


def resize_regions(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """`ids` (H, W) at another size, by nearest sampling at pixel centres."""
    if ids.shape == size_hw:
        return ids
    row, column = (((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size_hw, ids.shape, strict=True))
    return ids[row[:, None], column]


def encode_regions(ids: np.ndarray) -> bytes:
    """Encode region numbers, int32 (H, W), as a PNG of 16-bit grey."""
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_regions(encoded: bytes | memoryview | np.ndarray) -> np.ndarray:
    """Decode the region numbers of a mask, int32 (H, W).

    Raises:
        RegionsError: neither grey of 8 or 16 bits nor a palette image, whose indices are the numbers.
    """
    try:
        with open_image(encoded) as png:
            mode, ids = png.mode, np.asarray(png)
    except Exception as error:  # damaged bytes raise nearly any kind
        raise RegionsError(f"not a readable mask ({error})") from None
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise RegionsError(f"a mask of mode {mode} has no numbers; give grey of 8 or 16 bits")
    return ids.astype(np.int32)
