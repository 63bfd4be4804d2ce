"""Opens image files of unknown origin: `open_image` by Pillow; `sound_jpeg_hw` checks the structure of a JPEG.

A dataset's bytes are untrusted: torchvision's PNG decoder ends the process on a file that is cut short, so only JPEGs whose
structure is sound go to torchvision (see `workloads.data.loading.decode`), and all else goes through `open_image`.
"""

import functools
import io
from typing import TypeAlias

import numpy as np
from PIL import Image

Encoded: TypeAlias = bytes | bytearray | memoryview | np.ndarray

MAX_PIXELS = 178_956_970
"""Largest image that is decoded; the size at which Pillow refuses an image as a decompression bomb."""

EXIF_ORIENTATION = 0x0112

# Not: EPS, for which Pillow starts Ghostscript, and formats that no dataset of photographs has.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX", "SGI")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive
END_OF_IMAGE = b"\xff\xd9"
"""The marker that ends a JPEG."""


def open_image(encoded: Encoded) -> Image.Image:
    """The image that Pillow finds in these bytes, not decoded yet.

    Raises:
        Exception: of nearly any kind, here or when its pixels are loaded: the bytes are damaged or no image.
    """
    return Image.open(io.BytesIO(encoded), formats=_known_formats())  # type: ignore[arg-type]  # an array is a buffer too


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # without libavif there is no AVIF


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or EXIF data that cannot be read."""
    try:
        exif = image.getexif()
        if image.format in (
            "JPEG",
            "MPO",
        ):  # Pillow adds the orientation of XMP, which torchvision's decoder does not know
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")
        found = exif.get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raises half a dozen kinds, and the pixels may be sound
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """`image` turned as its EXIF orientation says."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def sound_jpeg_hw(data: bytes | bytearray) -> tuple[int, int] | None:
    """Height and width, pixels as stored, of a JPEG whose structure is sound; None for all other bytes.

    Sound is a JPEG whose segments follow one another up to the frame's header (ITU T.81, annex B), whose frame has 8 bits,
    Huffman coding and a size, and that has an end marker. The entropy-coded data is not looked at.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4])
        if marker in _START_OF_FRAME:
            height, width = (int.from_bytes(data[start : start + 2]) for start in (place + 5, place + 7))
            is_sound = (
                marker in _HUFFMAN_FRAMES
                and data[place + 4] == 8
                and data[place + 9] in (1, 3, 4)
                and height > 0 < width
                and data.rfind(END_OF_IMAGE, place + length) >= 0
            )
            return (height, width) if is_sound else None
        place += 2 + length
    return None
