"""Images made for tests: each one can be told from its pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "yellow": (210, 200, 40)}


def picture(number: int, *, width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture, different for every number: decodes from JPEG within a few grey levels."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    phases = np.random.default_rng(number).uniform(0, 2 * np.pi, size=3)
    channels = [127 + 100 * np.sin(5 * x + 4 * y + phase) for phase in phases]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def quarters(*, width: int = 80, height: int = 40) -> Image.Image:
    """Red, green over blue, yellow: tells which way is up."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for name, (row, column) in zip(COLOURS, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        pixels[row * height // 2 :, column * width // 2 :][: height // 2, : width // 2] = COLOURS[name]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95} if form == "JPEG" else {}) | options)
    return buffer.getvalue()


def make_folder(root: Path, *, classes: int = 4, per_class: int = 12, width: int = 64, height: int = 48) -> Path:
    """A folder with one folder a class."""
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for index in range(per_class):
            data = encoded(picture(1000 * label + index, width=width, height=height))
            (root / f"class_{label}" / f"{index:03d}.jpg").write_bytes(data)
    return root
