"""`scan_ends_early`: finds JPEGs whose image data is cut short before the end marker, which decoders fill with grey.

libjpeg only warns of it, and neither torchvision nor Pillow passes the warning on. The check costs nothing for most images:
libjpeg fills the blocks that are missing with middle grey, and only an image that ends with such a block is decoded again.
"""

import random

import numpy as np
from torch import Tensor

from workloads.data.loading.decode import decode_with_pillow
from workloads.data.store.image_file import END_OF_IMAGE, sound_jpeg_hw

_BLOCK = 8  # pixels a side of a JPEG's block
_FILLED = 128  # every channel of a block whose coefficients are all zero
_LEAST_DIFFERENCE = 4  # grey levels; decoders agree to fewer

# Without 0xFF, which would begin a marker.
_FILLER = bytes(random.Random(0).choices(range(255), k=64))


def scan_ends_early(data: bytes, image: Tensor) -> bool:
    """Whether a sequential JPEG has less image data than its size needs.

    With more bytes before the end marker, a cut scan decodes to other pixels, and a complete one to the same. A progressive
    JPEG is not checked: a cut leaves it blurred, not grey.

    Args:
        image: `data`, decoded and upright, uint8 (3, H, W).
    """
    if sound_jpeg_hw(data) is None or not any(_is_filled(corner) for corner in _corners(image.numpy())):
        return False
    end = data.rfind(END_OF_IMAGE)
    try:
        plain, filled = (decode_with_pillow(bytearray(d)) for d in (data, data[:end] + _FILLER + data[end:]))
    except (
        Exception
    ):  # Pillow refuses what torchvision decodes, with nearly any exception: nothing is known of the scan
        return False
    return bool((filled.int() - plain.int()).abs().max() >= _LEAST_DIFFERENCE)


def _corners(image: np.ndarray) -> list[np.ndarray]:
    """The visible parts of a last block in each corner: the EXIF orientation decides in which one the scan ends."""
    height, width = ((side - 1) % _BLOCK + 1 for side in image.shape[1:])
    return [
        image[:, rows, columns]
        for rows in (slice(None, height), slice(-height, None))
        for columns in (slice(None, width), slice(-width, None))
    ]


def _is_filled(corner: np.ndarray) -> bool:
    return bool((corner == _FILLED).all())
