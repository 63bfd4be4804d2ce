"""Draws a discovery: boxes over images, one colour a method (`draw_discoveries`), and crops of each cluster (`draw_clusters`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _TITLE, _LINE = 240, 12, 34, 16
_BACKGROUND, _INK, _MUTED = (255, 255, 255), (33, 37, 41), (108, 117, 125)
_HIT, _MISS = (31, 138, 76), (200, 48, 48)
# Okabe and Ito's colours, which differ without colour vision too; in the order of the methods.
_COLOURS = ((230, 159, 0), (86, 180, 233), (204, 121, 167), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0))
_CROP, _COLUMNS = 88, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One image with its objects and boxes."""

    pixels: np.ndarray  # uint8 (h, w, 3)
    title: str
    objects: np.ndarray  # float (n, 4): known objects, xyxy in pixels of `pixels`
    boxes: Mapping[str, np.ndarray]  # method → box (4,)
    iou: Mapping[str, float]  # method → IoU with the best object; nothing where no object is known


def draw_discoveries(panels: Sequence[Panel], target: Path, *, threshold: float) -> None:
    """Write a PNG of images with the boxes of each method, known objects thin and white, and the IoU below."""
    methods = list(dict.fromkeys(method for panel in panels for method in (*panel.boxes, *panel.iou)))
    colours = {method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(methods)}
    columns = min(_COLUMNS, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    cell_height = _SIDE + _LINE * (1 + len(methods)) + _GAP
    canvas = Image.new("RGB", (_GAP + columns * (_SIDE + _GAP), _TITLE + rows * cell_height + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    shown = {method for panel in panels for method in panel.boxes}
    _legend(draw, {method: colour for method, colour in colours.items() if method in shown})
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (_SIDE + _GAP), _TITLE + row * cell_height
        canvas.paste(_with_boxes(panel, colours), (left, top))
        font = ImageFont.load_default(12)
        draw.text((left, top + _SIDE + 2), _short(panel.title, 34), fill=_MUTED, font=font)
        for line, method in enumerate(methods, start=1):
            y = top + _SIDE + 2 + line * _LINE
            if method in shown:
                draw.rectangle((left, y + 3, left + 9, y + 12), fill=colours[method])
            iou = panel.iou.get(method)
            if method in shown and method not in panel.boxes:
                text, ink = f"{method}  no box", _MISS
            elif iou is None:
                text, ink = f"{method}  no known object", _MUTED
            else:
                text, ink = f"{method}  IoU {iou:.2f}", _HIT if iou >= threshold else _MISS
            draw.text((left + 15, y), text, fill=ink, font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _legend(draw: ImageDraw.ImageDraw, colours: Mapping[str, tuple[int, int, int]]) -> None:
    x, font = float(_GAP), ImageFont.load_default(14)
    for name, colour in {**colours, "known object": (255, 255, 255)}.items():
        draw.rectangle((x, 11, x + 12, 23), fill=colour, outline=_INK)
        draw.text((x + 18, 8), name, fill=_INK, font=font)
        x += 34 + draw.textlength(name, font=font)


def _with_boxes(panel: Panel, colours: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """The image in a square, its longer side filling it, with all boxes."""
    height, width = panel.pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (_SIDE, _SIDE), (241, 243, 245))
    image = Image.fromarray(panel.pixels).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for box in panel.objects:
        _outline(draw, box * scale, (255, 255, 255), 1, size)
    for method, box in panel.boxes.items():
        _outline(draw, box * scale, colours[method], 3, size)
    square.paste(image, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return square


def _outline(
    draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int], width: int, size: tuple[int, int]
) -> None:
    x0, y0, x1, y1 = np.rint(box).astype(int).tolist()
    x1, y1 = min(max(x1, x0 + 1), size[0]) - 1, min(max(y1, y0 + 1), size[1]) - 1
    x0, y0 = min(x0, x1), min(y0, y1)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=1)
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)


def draw_clusters(clusters: Mapping[str, tuple[int, Sequence[np.ndarray]]], target: Path) -> None:
    """Write a PNG with one row a cluster: its name, how many boxes it has, and some of them.

    Args:
        clusters: name → (boxes, crops uint8 (h, w, 3)), in the order to be shown.
    """
    most = max([len(crops) for _, crops in clusters.values()] or [0])
    label = 120
    size = (_GAP + label + most * (_CROP + 6) + _GAP, _GAP + len(clusters) * (_CROP + 10))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, (name, (count, crops)) in enumerate(clusters.items()):
        top = _GAP + row * (_CROP + 10)
        draw.text((_GAP, top + 22), name, fill=_INK, font=ImageFont.load_default(15))
        draw.text(
            (_GAP, top + 44), f"{count} box{'es' if count != 1 else ''}", fill=_MUTED, font=ImageFont.load_default(13)
        )
        for column, crop in enumerate(crops):
            canvas.paste(_thumbnail(crop), (_GAP + label + column * (_CROP + 6), top))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _thumbnail(crop: np.ndarray) -> Image.Image:
    image = Image.fromarray(crop)
    scale = _CROP / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (_CROP, _CROP), (241, 243, 245))
    square.paste(image, ((_CROP - image.width) // 2, (_CROP - image.height) // 2))
    return square


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
