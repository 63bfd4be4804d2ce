"""The pictures: a box's outline is where the box is, in its method's colour; odd images and nothing at all are drawn too."""

from pathlib import Path

import numpy as np
from PIL import Image

from workloads.reports.discoveries import Panel, draw_clusters, draw_discoveries

ORANGE = (230, 159, 0)


def panel(width: int, height: int, box: tuple[float, float, float, float], **iou: float) -> Panel:
    return Panel(
        pixels=np.full((height, width, 3), 90, dtype=np.uint8),
        title="a name that is far too long to stand below a picture of this size",
        objects=np.array([[1.0, 1, 5, 5]]),
        boxes={"lost": np.array(box)},
        iou=iou,
    )


def test_the_outline_is_where_the_box_is(tmp_path: Path) -> None:
    # 240 × 120 px fill the panel's width; the panel begins at (12, 34), the image 60 px lower.
    draw_discoveries([panel(240, 120, (40, 20, 140, 100), lost=0.7)], tmp_path / "a" / "boxes.png", threshold=0.5)
    picture = np.asarray(Image.open(tmp_path / "a" / "boxes.png"))
    orange = (picture == ORANGE).all(-1)
    orange[:94], orange[214:] = False, False  # without the legend and the caption
    rows, columns = np.nonzero(orange)
    assert (columns.min() - 12, rows.min() - 94, columns.max() + 1 - 12, rows.max() + 1 - 94) == (40, 20, 140, 100)


def test_odd_images_and_none(tmp_path: Path) -> None:
    narrow = panel(1, 400, (0, 0, 1, 400))
    tiny = panel(2, 2, (1, 1, 1, 1), lost=0.0)
    draw_discoveries([narrow, tiny] * 3, tmp_path / "boxes.png", threshold=0.5)
    draw_discoveries([], tmp_path / "none.png", threshold=0.5)
    crops = [np.zeros((1, 90, 3), dtype=np.uint8), np.zeros((300, 2, 3), dtype=np.uint8)]
    draw_clusters({"cluster_000": (2, crops), "cluster_001": (0, [])}, tmp_path / "clusters.png")
    draw_clusters({}, tmp_path / "no_clusters.png")
    sizes = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert len(sizes) == 4 and sizes["boxes.png"][0] > sizes["none.png"][0]
    assert sizes["clusters.png"][1] > sizes["no_clusters.png"][1]
