"""Sweep figures are drawn for whatever a sweep can bring: one trial, equal scores, missing and mixed values."""

import pytest
from PIL import Image

from workloads.reports.sweeps import draw_effects, draw_parallel_coordinates

KNOBS = ["objective.temperature", "objective.crop_grid", "optimizer.momentum"]


def point(temperature, grid, momentum=None):
    return {"objective.temperature": temperature, "objective.crop_grid": grid} | (
        {"optimizer.momentum": momentum} if momentum is not None else {}
    )


CASES = {
    "one trial": [(point(0.1, "native"), 0.3)],
    "equal scores": [(point(0.1, "native"), 0.3), (point(0.2, 4), 0.3)],
    "mixed": [
        (point(0.01 * 2**i, ("native", 4, 16)[i % 3], 0.5 + 0.05 * i if i % 2 else None), 0.1 * i) for i in range(8)
    ],
    "lists": [(point(0.1, ["P3", "P4"]), 0.3), (point(0.2, ["P3"]), 0.4)],
}


@pytest.mark.parametrize("case", list(CASES))
def test_figures_are_drawn(case, tmp_path):
    points = CASES[case]
    draw_parallel_coordinates(points, KNOBS, tmp_path / "parallel.png", title="score")
    draw_effects(points, KNOBS, {"objective.temperature": 0.7}, tmp_path / "effects.png", title="score")
    for name in ("parallel.png", "effects.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 20) or range(99)) > 10
