"""Draws region masks (`draw_region_overlays`): each image, and beside it the same with its regions coloured and outlined."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PANEL, _GAP, _TITLE = 200, 8, 26
# Hues a golden angle apart: neighbours in number never look alike.
_GOLDEN = 0.61803398875


def draw_region_overlays(rows: list[tuple[str, np.ndarray, dict[str, np.ndarray | None]]], target: Path) -> None:
    """Write a PNG with one row an image.

    Args:
        rows: image id, pixels uint8 (H, W, 3), and column → int32 (H, W), 0 where there is no region, or None.
    """
    columns = list(rows[0][2])
    width = _GAP + (1 + len(columns)) * (_PANEL + _GAP)
    canvas = Image.new("RGB", (width, _TITLE + len(rows) * (_PANEL + _TITLE)), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for place, title in enumerate(["image", *columns]):
        draw.text((_GAP + place * (_PANEL + _GAP), 6), title, fill=(33, 37, 41), font=ImageFont.load_default(14))
    for row, (name, pixels, masks) in enumerate(rows):
        top = _TITLE + row * (_PANEL + _TITLE)
        canvas.paste(_panel(pixels), (_GAP, top))
        draw.text((_GAP, top + _PANEL + 4), name[-28:], fill=(90, 90, 90), font=ImageFont.load_default(11))
        for place, column in enumerate(columns, start=1):
            ids, left = masks[column], _GAP + place * (_PANEL + _GAP)
            if ids is None:
                draw.text((left, top + 4), "no mask", fill=(90, 90, 90), font=ImageFont.load_default(12))
                continue
            canvas.paste(_panel(_overlay(pixels, ids)), (left, top))
            caption = f"{len(np.unique(ids[ids > 0]))} regions"
            draw.text((left, top + _PANEL + 4), caption, fill=(90, 90, 90), font=ImageFont.load_default(11))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _panel(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    panel = Image.new("RGB", (_PANEL, _PANEL), (238, 238, 238))
    panel.paste(image, ((_PANEL - image.width) // 2, (_PANEL - image.height) // 2))
    return panel


def _overlay(pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    hue = (np.arange(int(ids.max()) + 1) * _GOLDEN) % 1.0
    palette = 127.5 * (1 + np.cos(2 * np.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3]))))
    grey = pixels.mean(-1, keepdims=True)
    mixed = np.where(ids[..., None] > 0, 0.55 * grey + 0.45 * palette[ids], 0.4 * grey)
    edge = np.zeros(ids.shape, dtype=bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    mixed[edge] = 255
    return mixed.round().astype(np.uint8)
