"""Draws a detection evaluation (`draw_detections`): objects on the left, detections on the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workloads.data.store.objects import Objects
from workloads.types import Detections

_PANEL, _GAP, _TITLE, _HEADER, _LABEL = 320, 12, 36, 24, 13
_BACKGROUND, _INK = (255, 255, 255), (33, 37, 41)
# Okabe and Ito's colours, which differ without colour vision too; a category has the same in both columns.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def draw_detections(
    shown: Sequence[tuple[np.ndarray, Detections, Objects]],
    names: Mapping[int, str],
    target: Path,
    *,
    title: str,
    most: int = 8,
) -> None:
    """Write a PNG with one row an image: its objects on the left, its `most` best detections on the right.

    Args:
        shown: (pixels uint8 (h, w, 3), detections, objects) of each image; the pixels may be smaller than the source.
        names: label → category.
    """
    labels = {name: label for label, name in names.items()}
    heights = [round(_PANEL * image.shape[0] / image.shape[1]) for image, _, _ in shown]
    canvas = Image.new("RGB", (3 * _GAP + 2 * _PANEL, _TITLE + _HEADER + sum(h + _GAP for h in heights)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 9), title, fill=_INK, font=ImageFont.load_default(16))
    for column, text in enumerate(("objects", f"detections, at most {most}")):
        draw.text((_GAP + column * (_PANEL + _GAP), _TITLE), text, fill=_INK, font=ImageFont.load_default(14))
    top = _TITLE + _HEADER
    for (image, detections, objects), height in zip(shown, heights, strict=True):
        scale = _PANEL / objects.size_hw[1]
        true = [
            (box * scale, labels.get(name, 0), name)
            for box, name in zip(objects.boxes_xyxy, objects.categories, strict=True)
        ]
        best = [
            (box * scale, int(label), f"{names.get(int(label), '?')} {score:.2f}")
            for box, label, score in zip(
                detections.boxes_xyxy[:most].cpu().numpy(),
                detections.labels[:most].tolist(),
                detections.scores[:most].tolist(),
                strict=True,
            )
        ]
        panel = Image.fromarray(image).resize((_PANEL, height), Image.Resampling.BILINEAR)
        canvas.paste(_with_boxes(panel, true), (_GAP, top))
        canvas.paste(_with_boxes(panel, best), (2 * _GAP + _PANEL, top))
        top += height + _GAP
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _with_boxes(panel: Image.Image, boxes: Sequence[tuple[np.ndarray, int, str]]) -> Image.Image:
    panel = panel.copy()
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(_LABEL)
    for box, label, text in reversed(boxes):
        colour = _COLOURS[label % len(_COLOURS)]
        x0, y0, x1, y1 = box.tolist()
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        width = draw.textlength(text, font=font)
        x, y = min(x0, panel.width - width - 4), max(0.0, y0 - _LABEL - 3)
        draw.rectangle((x, y, x + width + 4, y + _LABEL + 3), fill=colour)
        draw.text((x + 2, y), text, fill=_INK, font=font)
    return panel
