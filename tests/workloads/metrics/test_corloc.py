"""CorLoc's convention on cases worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest

from workloads.data.store.annotations import Annotations
from workloads.metrics.corloc import CorLocConfig, corloc_figures, corloc_gain, corloc_hits, iou_of


def truth(*boxes: tuple[float, float, float, float], crowd: object = (), difficult: object = ()) -> Annotations:
    n = len(boxes)
    return Annotations(
        label=None,
        size_hw=(100, 100),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        categories=("thing",) * n,
        crowd=np.array(crowd or [False] * n, dtype=bool),
        difficult=np.array(difficult or [False] * n, dtype=bool),
    )


def box(*sides: float) -> np.ndarray:
    return np.array(sides, dtype=np.float64)


@pytest.mark.parametrize(
    ("found", "hit"),
    [
        (box(0, 0, 10, 5), True),  # half of 10 × 10, inside: exactly 0.5
        (box(0, 0, 10, 4.999), False),
        (box(0, 0, 20, 10), True),  # twice of it, around: exactly 0.5
        (box(0, 0, 20.001, 10), False),
        (box(2, 0, 12, 10), True),  # 80 / 120
        (box(0, 0, 10, 10), True),
        (box(10, 0, 20, 10), False),  # half-open: they touch and share nothing
        (box(3, 3, 3, 9), False),  # no area
    ],
)
def test_exactly_half_counts(found: np.ndarray, hit: bool) -> None:
    hits = corloc_hits({"a": found}, {"a": truth((0, 0, 10, 10))})
    assert hits.hit.tolist() == [hit]


def test_exactly_a_third_counts() -> None:
    # 1/3 has no binary form: the division rounds as the threshold was.
    sides = [(0, 0, n, 1) for n in range(1, 200)]
    whole = [(0, 0, 3 * n, 1) for n in range(1, 200)]
    iou = 1 / 3  # a float just below a third
    assert (iou_of(np.array(sides), np.array(whole)).diagonal() >= iou).all()


def test_no_iou_below_a_half_is_rounded_up_to_it() -> None:
    """Against exact fractions, on boxes whose IoU lies within a few units of the last place of one half."""
    whole = np.array([[0.0, 0.0, 1.0, 1.0]])
    for steps in range(-4, 5):
        height = 0.5
        for _ in range(abs(steps)):
            height = float(np.nextafter(height, np.sign(steps) * np.inf))
        assert (iou_of(np.array([[0.0, 0.0, 1.0, height]]), whole)[0, 0] >= 0.5) == (Fraction(height) >= Fraction(1, 2))
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (200, 2)).tolist():
        one = np.array([[0, 0, width, height]])
        two = np.array([[0, 0, width, 2 * height], [0, 0, width, 2 * height + 1e-9]])
        assert (iou_of(one, two)[0] >= 0.5).tolist() == [True, Fraction(2 * height + 1e-9) <= 2 * height]


def test_a_box_turned_inside_out_has_no_area() -> None:
    assert iou_of(np.array([[9.0, 9.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 9.0, 9.0]])).tolist() == [[0.0]]


def test_any_object_counts_and_which_objects_do() -> None:
    annotated = {
        "any": truth((50, 50, 60, 60), (0, 0, 10, 10)),
        "crowd": truth((0, 0, 10, 10), crowd=[True]),
        "difficult": truth((0, 0, 10, 10), difficult=[True]),
        "empty": truth(),
        "no box": truth((0, 0, 10, 10)),
    }
    found = {name: box(0, 0, 10, 10) for name in annotated if name != "no box"}
    hits = corloc_hits(found, annotated)
    assert dict(zip(hits.image_ids, hits.hit.tolist(), strict=True)) == {
        "any": True,
        "difficult": True,
        "no box": False,
    }
    assert hits.without_objects == 2
    assert hits.best_iou.tolist() == [1.0, 1.0, 0.0]
    with_crowd = corloc_hits(found, annotated, CorLocConfig(crowd=True, difficult=False))
    assert with_crowd.image_ids == ("any", "crowd", "no box") and with_crowd.without_objects == 2
    figures = corloc_figures(hits)
    assert (figures["corloc"], figures["images"], figures["images_without_objects"]) == (2 / 3, 3.0, 2.0)
    assert corloc_figures(corloc_hits({}, {"empty": truth()})) == {"images": 0.0, "images_without_objects": 1.0}


def test_intervals_are_over_images_and_differences_are_paired() -> None:
    annotated = {f"{i:03d}": truth((0, 0, 10, 10)) for i in range(200)}
    ours = corloc_hits({n: box(0, 0, 10, 10) for n in list(annotated)[:120]}, annotated)
    theirs = corloc_hits({n: box(0, 0, 10, 10) for n in list(annotated)[:100]}, annotated)
    figures = corloc_figures(ours)
    normal = 1.96 * (0.6 * 0.4 / 200) ** 0.5
    assert figures["corloc_low"] == pytest.approx(0.6 - normal, abs=0.015)
    assert figures["corloc_high"] == pytest.approx(0.6 + normal, abs=0.015)
    gain, low, high = corloc_gain(ours, theirs)
    assert gain == pytest.approx(0.1) and 0.05 < low < gain < high < 0.15  # unpaired it would reach from 0 to .2
    with pytest.raises(ValueError, match="same images"):
        corloc_gain(ours, corloc_hits({}, {"other": truth((0, 0, 1, 1))}))


def test_iou_agrees_with_pycocotools() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 50, size=(2, 40, 2, 2)).astype(float)
    a, b = (np.concatenate([c.min(1), c.max(1) + 1], axis=1) for c in corners)
    xywh = [np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1) for x in (a, b)]
    np.testing.assert_allclose(iou_of(a, b), mask.iou(*xywh, [0] * 40), rtol=1e-12)
