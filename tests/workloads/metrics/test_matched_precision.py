"""Clusters as classes: the match by trying every assignment, AP50 of perfect, mixed and missing clusters by hand."""

import itertools

import numpy as np
import pytest

from tests.workloads.metrics.test_corloc import truth as annotated
from workloads.data.store.annotations import Annotations
from workloads.discovery.pseudo_boxes import BoxTable
from workloads.metrics.matched_precision import fit_match, matched_precision

pytest.importorskip("pycocotools")


def named(name: str, *boxes: tuple[float, float, float, float]) -> Annotations:
    found = annotated(*boxes)
    return Annotations(
        label=None,
        size_hw=found.size_hw,
        boxes_xyxy=found.boxes_xyxy,
        categories=(name,) * len(boxes),
        crowd=found.crowd,
        difficult=found.difficult,
    )


def found(rows: list[tuple[str, tuple[float, float, float, float], float, str]]) -> BoxTable:
    return BoxTable(
        image_ids=tuple(r[0] for r in rows),
        boxes_xyxy=np.array([r[1] for r in rows], dtype=np.float64).reshape(-1, 4),
        scores=np.array([r[2] for r in rows]),
        categories=tuple(r[3] for r in rows),
    )


def test_the_match_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    classes, clusters = ["ant", "bee", "cow"], [f"cluster_{i:03d}" for i in range(5)]
    for _ in range(20):
        truth, rows = {}, []
        for i in range(30):
            truth[str(i)] = named(classes[rng.integers(3)], (0, 0, 10, 10))
            box = (0, 0, 10, 10) if rng.random() < 0.7 else (50, 50, 60, 60)
            rows.append((str(i), box, 1.0, clusters[rng.integers(5)]))
        match = fit_match(found(rows), truth)

        def count(assigned: dict[str, str], rows=rows, truth=truth) -> int:
            return sum(b[0] == 0 and assigned.get(c) == truth[i].categories[0] for i, b, _, c in rows)

        best = max(count(dict(zip(p, classes, strict=True))) for p in itertools.permutations(clusters, 3))
        assert count(match) == best
        assert len(set(match.values())) == len(match)


def test_ap50_of_matched_classes() -> None:
    truth = {
        "1": named("ant", (0, 0, 10, 10)),
        "2": named("ant", (0, 0, 10, 10)),
        "3": named("bee", (0, 0, 10, 10)),
        "4": named("cow", (0, 0, 10, 10)),
    }
    boxes = found(
        [
            ("1", (0, 0, 10, 10), 0.9, "c0"),
            ("2", (50, 50, 60, 60), 0.8, "c0"),  # wrong
            ("2", (0, 0, 10, 10), 0.7, "c0"),
            ("3", (0, 0, 10, 10), 0.6, "c1"),
            ("4", (0, 0, 10, 10), 0.6, "left over"),
        ]
    )
    figures = matched_precision(boxes, truth, {"c0": "ant", "c1": "bee"})
    # ant: precision 1 up to half of the recall, then 2/3: 51 of the 101 points at 1, 50 at 2/3.
    assert figures["ant"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (figures["bee"], figures["cow"]) == (pytest.approx(1.0), 0.0)
    assert figures["mean"] == pytest.approx((figures["ant"] + 1) / 3)
    swapped = matched_precision(boxes, truth, {"c0": "bee", "c1": "ant"})
    assert swapped["mean"] == 0.0
    assert matched_precision(found([]), truth, {})["mean"] == 0.0
    assert fit_match(found([]), truth) == {}
