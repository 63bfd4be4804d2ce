"""Draws a retrieval gallery (`draw_gallery`): queries, and the regions of other images that are most similar to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workloads.metrics.one_shot import Query
from workloads.metrics.retrieval import Region

_PANEL, _GAP, _TITLE, _CAPTION = 144, 10, 36, 22
_CONTEXT = 1.6  # side of the shown square, as a multiple of the region's longer side
_BACKGROUND, _INK, _QUERY = (255, 255, 255), (33, 37, 41), (0, 114, 178)
_SAME, _OTHER = (31, 138, 76), (200, 48, 48)


def draw_gallery(
    rows: Sequence[tuple[Query, Sequence[Region]]], images: Mapping[int, np.ndarray], target: Path, *, title: str
) -> None:
    """Write a PNG with one row a query: the query, then its regions, framed by whether they are of its category.

    Args:
        images: image number → pixels uint8 (h, w, 3), at the source resolution.
    """
    columns = 1 + max((len(regions) for _, regions in rows), default=0)
    width, height = _GAP + columns * (_PANEL + _GAP), _TITLE + len(rows) * (_PANEL + _CAPTION + _GAP)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 9), title, fill=_INK, font=ImageFont.load_default(16))
    font = ImageFont.load_default(13)
    for i, (query, regions) in enumerate(rows):
        top = _TITLE + i * (_PANEL + _CAPTION + _GAP)
        shown = [(query.image, query.box_xyxy, _QUERY, f"query: {query.category}")]
        shown += [
            (
                region.image,
                region.box_xyxy,
                _SAME if region.is_same else _OTHER,
                f"{'same' if region.is_same else 'other'}   {region.similarity:.2f}",
            )
            for region in regions
        ]
        for k, (place, box, colour, caption) in enumerate(shown):
            left = _GAP + k * (_PANEL + _GAP)
            canvas.paste(_panel(images[place], box, colour), (left, top))
            draw.text((left, top + _PANEL + 3), caption, fill=colour, font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _panel(pixels: np.ndarray, box: tuple[float, float, float, float], colour: tuple[int, int, int]) -> Image.Image:
    """A square of the image around the region, with its frame; white outside the image."""
    x0, y0, x1, y1 = box
    side = _CONTEXT * max(x1 - x0, y1 - y0, 8)
    left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    padded = Image.new("RGB", (pixels.shape[1] + 2, pixels.shape[0] + 2), _BACKGROUND)
    padded.paste(Image.fromarray(pixels), (1, 1))
    panel = padded.transform(
        (_PANEL, _PANEL),
        Image.Transform.EXTENT,
        (left + 1, top + 1, left + side + 1, top + side + 1),
        Image.Resampling.BILINEAR,
        fillcolor=_BACKGROUND,
    )
    scale = _PANEL / side
    frame = [(x0 - left) * scale, (y0 - top) * scale, (x1 - left) * scale - 1, (y1 - top) * scale - 1]
    ImageDraw.Draw(panel).rectangle(frame, outline=colour, width=3)
    return panel
