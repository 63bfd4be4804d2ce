"""Images made for tests: each one can be told from its pixels."""

import io
import json
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


def make_coco(root: Path, *, count: int = 16, first: int = 1) -> Path:
    """A COCO folder: `images/`, `instances.json`, `panoptic.json` with its PNGs; red squares and blue bars on a grey ground.

    Every fourth image is empty; every image with objects has a square, every other one of them a bar too.
    """
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    kinds = [{"id": 1, "name": "square", "isthing": 1}, {"id": 7, "name": "bar", "isthing": 1}]
    ground = {"id": 9, "name": "ground", "isthing": 0}
    images, annotations, panoptic = [], [], []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        width, height = (96, 64) if number % 2 else (64, 80)
        pixels = rng.integers(90, 130, size=(height, width, 3)).astype(np.uint8)
        ids = np.full((height, width), 300 + number, dtype=np.int64)
        segments = [{"id": 300 + number, "category_id": 9, "bbox": [0, 0, width, height], "iscrowd": 0}]
        shapes = [] if number % 4 == 0 else [(1, 20, 20, (220, 30, 30)), (7, 40, 10, (30, 40, 220))][: 1 + number % 2]
        for kind, w, h, colour in shapes:
            x, y = (
                int(rng.integers(0, width - w)),
                int(rng.integers(0, height // 2 - h)) + (height // 2 if kind == 7 else 0),
            )
            pixels[y : y + h, x : x + w] = colour
            ids[y : y + h, x : x + w] = segment = 70_000 * kind + number
            box = [x, y, w, h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            segments.append({"id": segment, "category_id": kind, "bbox": box, "iscrowd": 0})
        name = f"{number:012d}"
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        Image.fromarray(np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)).save(
            root / "panoptic" / f"{name}.png"
        )
        images.append({"id": number, "file_name": f"{name}.png", "width": width, "height": height})
        panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    instances = {"images": images, "annotations": annotations, "categories": kinds}
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "panoptic.json").write_text(
        json.dumps({"images": images, "annotations": panoptic, "categories": [*kinds, ground]})
    )
    return root
