"""Encodes region masks as PNG columns, decodes them and resizes them."""

import io

import numpy as np
from PIL import Image

from workloads.data.store.image_file import open_image
from workloads.errors import RunFailedError

PREFIX = "regions_"
"""What the name of every column of regions begins with."""

MOST_REGIONS = 65535  # what 16 bits hold


class RegionsError(RunFailedError):
    """A mask that was given cannot be used; the message says why."""


def resize_regions(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """`ids` (H, W) at another size, by nearest sampling at pixel centres."""
    if ids.shape == size_hw:
        return ids
    row, column = (((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size_hw, ids.shape, strict=True))
    return ids[row[:, None], column]


def encode_regions(ids: np.ndarray) -> bytes:
    """int32 (H, W) as a PNG of 16-bit grey."""
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_regions(encoded: bytes | memoryview | np.ndarray) -> np.ndarray:
    """A mask's numbers, int32 (H, W).

    Raises:
        RegionsError: not a grey image of 8 or 16 bits, nor one with a palette, whose indices are the numbers.
    """
    try:
        with open_image(encoded) as png:
            mode, ids = png.mode, np.asarray(png)
    except Exception as error:  # damaged bytes raise nearly any kind
        raise RegionsError(f"not a readable mask ({error})") from None
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise RegionsError(f"a mask of mode {mode} has no numbers; give grey of 8 or 16 bits")
    return ids.astype(np.int32)
