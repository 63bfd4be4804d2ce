"""Pascal VOC's average precision against a restatement of the development kit, and by hand."""

import numpy as np
import pytest

from tests.oracles.voc import voc_ap
from workloads.data.store.objects import Objects
from workloads.metrics.average_precision import DetectionTable, Truth
from workloads.metrics.voc_precision import Curve, voc_precision


def objects(boxes: list[tuple[float, ...]], names: list[str], difficult: list[bool]) -> Objects:
    nothing = np.zeros(len(boxes), dtype=bool)
    return Objects(
        size_hw=(100, 100),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        categories=tuple(names),
        crowd=nothing,
        difficult=np.array(difficult, dtype=bool),
    )


def detections(rows: list[tuple[int, int, float, tuple[float, ...]]]) -> DetectionTable:
    return DetectionTable(
        image=np.array([row[0] for row in rows], dtype=np.int64),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        scores=np.array([row[2] for row in rows], dtype=np.float64),
        boxes_xyxy=np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4),
    )


@pytest.mark.parametrize("curve", ["area", "11_points"])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_development_kits(seed: int, curve: Curve) -> None:
    rng = np.random.default_rng(seed)
    truth, found = [], []
    kit_objects: dict[int, list] = {1: [], 2: []}
    kit_found: dict[int, list] = {1: [], 2: []}
    for image in range(12):
        n = int(rng.integers(0, 5))
        corner = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([corner, corner + rng.integers(8, 40, (n, 2))], axis=1)
        labels, difficult = rng.integers(1, 3, n), rng.random(n) < 0.25
        truth.append(objects(boxes.tolist(), [f"class {k}" for k in labels], difficult.tolist()))
        for box, label, flag in zip(boxes.tolist(), labels.tolist(), difficult.tolist(), strict=True):
            kit_objects[label].append((image, flag, (box[0] + 1, box[1] + 1, box[2], box[3])))
            for _ in range(int(rng.integers(0, 4))):
                moved = np.array(box) + rng.integers(-6, 7, 4)
                found.append((image, int(label if rng.random() < 0.8 else 3 - label), rng.random(), tuple(moved)))
    for image, label, score, box in found:
        kit_found[label].append((image, score, (box[0] + 1, box[1] + 1, box[2], box[3])))
    figures = voc_precision(detections(found), Truth(objects=truth, labels={"class 1": 1, "class 2": 2}), curve=curve)
    wanted = {
        threshold: [voc_ap(kit_found[k], kit_objects[k], threshold, eleven_points=curve == "11_points") for k in (1, 2)]
        for threshold in np.arange(50, 100, 5) / 100
    }
    assert figures["voc_ap50"] == pytest.approx(np.mean(wanted[0.5]))
    assert figures["voc_ap75"] == pytest.approx(np.mean(wanted[0.75]))
    assert figures["voc_ap"] == pytest.approx(np.mean(list(wanted.values())))
    assert figures["voc_ap50/class 2"] == pytest.approx(wanted[0.5][1])


def test_by_hand() -> None:
    truth = Truth(
        objects=[objects([(0, 0, 10, 10), (20, 20, 40, 40)], ["cat", "cat"], [False, True]), objects([], [], [])],
        labels={"cat": 1, "dog": 2},
    )
    rows = [
        (0, 1, 0.9, (0, 0, 10, 10)),  # a hit
        (0, 1, 0.8, (20, 20, 40, 40)),  # on the difficult object: counts neither way
        (0, 1, 0.7, (20, 20, 40, 38)),  # again
        (1, 1, 0.6, (0, 0, 5, 5)),  # a false positive, after all recall was reached
    ]
    figures = voc_precision(detections(rows), truth)
    assert figures["voc_ap50"] == 1.0 and "voc_ap50/dog" not in figures
    # IoU of exactly a half does not count; then the only detection is false, and AP is 0.
    assert voc_precision(detections([(0, 1, 0.9, (0, 0, 10, 5))]), truth)["voc_ap50"] == 0.0
    # The second detection of one object is false: precision falls to a half before the second object's hit.
    two = Truth(
        objects=[objects([(0, 0, 10, 10), (50, 50, 60, 60)], ["cat", "cat"], [False, False])], labels={"cat": 1}
    )
    rows = [(0, 1, 0.9, (0, 0, 10, 10)), (0, 1, 0.8, (0, 0, 10, 9)), (0, 1, 0.7, (50, 50, 60, 60))]
    assert voc_precision(detections(rows), two)["voc_ap50"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_nothing_found_and_nothing_to_find() -> None:
    empty = detections([])
    cat = Truth(objects=[objects([(0, 0, 10, 10)], ["cat"], [False])], labels={"cat": 1})
    assert voc_precision(empty, cat)["voc_ap50"] == 0.0
    nobody = Truth(objects=[objects([], [], [])], labels={"cat": 1})
    assert np.isnan(voc_precision(detections([(0, 1, 0.5, (0, 0, 9, 9))]), nobody)["voc_ap50"])
