"""Draws a grid-accuracy evaluation (`draw_heatmaps`): query, image, and the similarity map of each pyramid level."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from workloads.metrics.grid_accuracy import MEAN_MAP, best_cell_is_in, would_hit
from workloads.types import Views

_PANEL, _GAP, _HEADER, _TITLE, _CAPTION = 176, 10, 24, 34, 22
_BACKGROUND, _INK, _BOX = (255, 255, 255), (33, 37, 41), (255, 255, 255)
_HIT, _MISS = (31, 138, 76), (200, 48, 48)
# Viridis at nine even steps: perceptually even, and readable without colour vision.
_MAP = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    dtype=np.float32,
)  # fmt: skip


def draw_heatmaps(views: Views, maps: dict[str, Tensor], target: Path, *, title: str) -> None:
    """Write a PNG with one row an image: its first crop, the image with the crop's box, and each similarity map.

    Args:
        views: of B images; the first crop of each is shown.
        maps: {name: float32 tensor (B, K, h, w)} as from `similarity_maps`.
    """
    names = [*[name for name in maps if name != MEAN_MAP], MEAN_MAP]
    columns = ["query", "image", *[f"{name} similarity" if name != MEAN_MAP else "mean map" for name in names]]
    rows = int(views.valid.sum())
    row_height = _PANEL + _CAPTION + _GAP
    width = _GAP + len(columns) * (_PANEL + _GAP)
    canvas = Image.new("RGB", (width, _TITLE + _HEADER + rows * row_height + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 8), title, fill=_INK, font=ImageFont.load_default(17))
    for i, column in enumerate(columns):
        draw.text((_GAP + i * (_PANEL + _GAP), _TITLE), column, fill=_INK, font=ImageFont.load_default(14))

    for row, image in enumerate(views.valid.nonzero().flatten().tolist()):
        top = _TITLE + _HEADER + row * row_height
        full = _panel(views.full[image].permute(1, 2, 0).cpu().numpy())
        box = (views.geometry.box_xyxy[image, 0].cpu().numpy() * _PANEL / views.geometry.full_size_hw[1]).tolist()
        canvas.paste(_panel(views.crops[image, 0].permute(1, 2, 0).cpu().numpy()), (_GAP, top))
        canvas.paste(_with_box(full, box), (_GAP + _PANEL + _GAP, top))
        for i, name in enumerate(names, start=2):
            left = _GAP + i * (_PANEL + _GAP)
            similarity = maps[name][image : image + 1, :1]
            grid_hw = (similarity.shape[-2], similarity.shape[-1])
            hit = bool(best_cell_is_in(similarity.cpu(), would_hit(views, grid_hw)[image : image + 1, :1].cpu()))
            values = similarity[0, 0].float().cpu().numpy()
            canvas.paste(_heat(full, values, box, _HIT if hit else _MISS), (left, top))
            caption = f"{'hit' if hit else 'miss'}   max {values.max():.2f}"
            draw.text((left, top + _PANEL + 3), caption, fill=_HIT if hit else _MISS, font=ImageFont.load_default(13))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


def _panel(pixels: np.ndarray) -> Image.Image:
    """float (h, w, 3) in [0, 1] as a square panel."""
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)


def _with_box(panel: Image.Image, box: list[float]) -> Image.Image:
    panel = panel.copy()
    draw = ImageDraw.Draw(panel)
    x0, y0, x1, y1 = (round(v) for v in box)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=1)
    draw.rectangle((x0, y0, x1, y1), outline=_BOX, width=2)
    return panel


def _heat(full: Image.Image, values: np.ndarray, box: list[float], mark: tuple[int, int, int]) -> Image.Image:
    """A similarity map over the greyed image, with the crop's box and the best cell outlined in `mark`."""
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / (spread if spread > 0 else 1.0) * (len(_MAP) - 1)
    low = np.minimum(scaled.astype(int), len(_MAP) - 2)
    colours = _MAP[low] + (scaled - low)[..., None] * (_MAP[low + 1] - _MAP[low])
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
    panel = _with_box(Image.blend(full.convert("L").convert("RGB"), heat, 0.65), box)
    row, column = divmod(int(values.argmax()), values.shape[1])
    x, y = column * _PANEL / values.shape[1], row * _PANEL / values.shape[0]
    cell = (round(x), round(y), round(x + _PANEL / values.shape[1]) - 1, round(y + _PANEL / values.shape[0]) - 1)
    ImageDraw.Draw(panel).rectangle(cell, outline=mark, width=3)
    return panel
