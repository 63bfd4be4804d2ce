"""AP against cases counted by hand, a plain pycocotools call on files, and itself over ranks."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.processes import run_on_ranks
from workloads.data.store.objects import Objects
from workloads.metrics.average_precision import (
    FIGURES,
    DetectionTable,
    Truth,
    average_precision,
    encode_masks,
    evaluate_with_pycocotools,
    gather_table,
    resampled_ap50,
)

SQUARE = [0.0, 0.0, 40.0, 40.0]
ASIDE = [60.0, 60.0, 100.0, 100.0]
NOWHERE = [150.0, 150.0, 190.0, 190.0]


def image(
    *boxes: list[float], names: str = "", crowd: tuple[int, ...] = (), difficult: tuple[int, ...] = ()
) -> Objects:
    """One image of 200 × 200 pixels; categories are letters."""
    places = np.arange(len(boxes))
    return Objects(
        size_hw=(200, 200),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        categories=tuple(names or "a" * len(boxes)),
        crowd=np.isin(places, crowd),
        difficult=np.isin(places, difficult),
    )


def table(*rows: tuple[int, list[float], float, int]) -> DetectionTable:
    """Rows of (image, box, score, label)."""
    return DetectionTable(
        image=np.array([row[0] for row in rows], dtype=np.int64),
        boxes_xyxy=np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], dtype=np.float64),
        labels=np.array([row[3] for row in rows], dtype=np.int64),
    )


def ap(found: DetectionTable, *images: Objects, labels: dict[str, int] | None = None) -> dict[str, float]:
    return average_precision(found, Truth(objects=images, labels=labels or {"a": 1}))


def test_what_is_found_exactly_scores_one_and_nothing_scores_zero():
    both = ap(table((0, SQUARE, 0.9, 1), (0, ASIDE, 0.8, 1)), image(SQUARE, ASIDE))
    assert both["ap"] == both["ap50"] == both["ap_medium"] == pytest.approx(1.0)
    assert np.isnan(both["ap_small"]) and np.isnan(both["ap_large"])
    none = ap(table(), image(SQUARE))
    assert none["ap"] == none["ap50"] == none["ar"] == 0.0
    assert np.isnan(ap(table((0, SQUARE, 0.9, 1)), image())["ap"])  # nothing asked for


def test_half_the_objects_and_a_false_alarm_before_it():
    # Precision 1/2 at recall 1/2, nothing beyond: 51 of the 101 recalls (0, .01 … .5) score a half.
    found = table((0, NOWHERE, 0.9, 1), (0, SQUARE, 0.8, 1))
    assert ap(found, image(SQUARE, ASIDE))["ap50"] == pytest.approx(51 / 101 / 2)


def test_a_second_detection_of_an_object_is_a_false_alarm():
    # Scores 1 up to recall 1/2, then 2/3 at full recall.
    found = table((0, SQUARE, 0.9, 1), (0, SQUARE, 0.8, 1), (0, ASIDE, 0.7, 1))
    assert ap(found, image(SQUARE, ASIDE))["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_overlap_decides_which_thresholds_are_met():
    shifted = [0.0, 0.0, 40.0, 31.0]  # IoU 0.775: six thresholds, .50 to .75
    found = ap(table((0, shifted, 0.9, 1)), image(SQUARE))
    assert (found["ap50"], found["ap75"], found["ap"]) == pytest.approx((1.0, 1.0, 0.6))


def test_a_crowd_takes_any_number_and_asks_for_none_a_difficult_object_takes_one():
    inside = table((0, SQUARE, 0.9, 1), (0, [5.0, 5.0, 30.0, 30.0], 0.85, 1), (0, ASIDE, 0.8, 1))
    assert ap(inside, image(SQUARE, ASIDE, crowd=(0,)))["ap50"] == pytest.approx(1.0)
    twice = table((0, SQUARE, 0.9, 1), (0, SQUARE, 0.85, 1), (0, ASIDE, 0.8, 1))
    # The first is ignored, the second is a false alarm before the only object: precision 1/2.
    assert ap(twice, image(SQUARE, ASIDE, difficult=(0,)))["ap50"] == pytest.approx(0.5)
    assert ap(table((0, ASIDE, 0.8, 1)), image(SQUARE, ASIDE, difficult=(0,)))["ar"] == pytest.approx(1.0)


def test_the_hundred_best_of_an_image_count():
    rows = [(0, NOWHERE, 0.9 - i / 1000, 1) for i in range(100)]
    assert ap(table(*rows, (0, SQUARE, 0.1, 1)), image(SQUARE))["ap50"] == 0.0
    assert ap(table(*rows[:99], (0, SQUARE, 0.1, 1)), image(SQUARE))["ap50"] == pytest.approx(0.01)


def test_categories_count_alike_and_one_that_is_not_asked_for_does_not():
    found = table((0, SQUARE, 0.9, 1), (1, SQUARE, 0.9, 1), (1, NOWHERE, 0.9, 3))
    images = (image(SQUARE, ASIDE, names="ab"), image(SQUARE))
    assert ap(found, *images, labels={"a": 1, "b": 2, "c": 3})["ap50"] == pytest.approx(0.5)


def random_case(seed: int = 0, images: int = 12) -> tuple[DetectionTable, Truth]:
    rng = np.random.default_rng(seed)
    truths, rows = [], []
    for i in range(images):
        corner = rng.uniform(0, 70, (rng.integers(0, 5), 2))
        boxes = np.concatenate([corner, corner + rng.uniform(8, 125, corner.shape)], axis=1)
        names = "".join(rng.choice(list("abc"), len(boxes)))
        truths.append(image(*boxes.tolist(), names=names, crowd=(1,) if len(boxes) > 3 else ()))
        for box, name in zip(boxes, names, strict=True):
            for _ in range(3):
                shaken = box + rng.normal(0, 6, 4)
                shaken[2:] = np.maximum(shaken[2:], shaken[:2] + 2)
                label = "abc".index(name) + 1 if rng.random() < 0.8 else int(rng.integers(1, 4))
                rows.append((i, shaken.tolist(), round(float(rng.random()), 2), label))  # ties among them
    return table(*rows), Truth(objects=truths, labels={"a": 1, "b": 2, "c": 3})


def plain_pycocotools(found: DetectionTable, truth: Truth, folder: Path) -> list[float]:
    """As its own demo calls it: two JSON files, no flags."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {
            "id": 100 * i + k + 1, "image_id": i, "category_id": truth.labels[name], "iscrowd": int(item.crowd[k]),
            "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "area": (box[2] - box[0]) * (box[3] - box[1]),
        }
        for i, item in enumerate(truth.objects)
        for k, (box, name) in enumerate(zip(item.boxes_xyxy.astype(float).tolist(), item.categories, strict=True))
    ]  # fmt: skip
    (folder / "truth.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "height": 200, "width": 200} for i in range(len(truth.objects))],
                "categories": [{"id": label} for label in truth.labels.values()],
                "annotations": annotations,
            }
        )
    )
    results = [
        {"image_id": int(i), "category_id": int(c), "score": float(s), "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for i, b, s, c in zip(found.image, found.boxes_xyxy.tolist(), found.scores, found.labels, strict=True)
    ]
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(ground, ground.loadRes(str(folder / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_plain_call_of_pycocotools(seed, tmp_path):
    found, truth = random_case(seed)
    figures = average_precision(found, truth)
    expected = plain_pycocotools(found, truth, tmp_path)
    assert [figures[name] for name in FIGURES] == pytest.approx(expected, abs=1e-12)
    assert 0.05 < figures["ap"] < 0.95


def test_the_resampled_ap50_of_every_image_once_is_ap50_and_repeats_count():
    found, truth = random_case(1)
    evaluation = evaluate_with_pycocotools(found, truth)
    once = resampled_ap50(evaluation, np.ones((1, len(truth.objects))))
    assert once == pytest.approx([evaluation.stats[1]], abs=1e-12)
    # Some images twice, some never: the same as a dataset in which they are.
    draws = np.array([[2, 0, 1, 3, 0, 1, 1, 1, 0, 2, 1, 0]])
    copies = [i for i, count in enumerate(draws[0]) for _ in range(count)]
    rows = [np.flatnonzero(found.image == i) for i in copies]
    longer = DetectionTable(
        image=np.repeat(np.arange(len(copies)), [len(r) for r in rows]),
        boxes_xyxy=found.boxes_xyxy[np.concatenate(rows)],
        scores=found.scores[np.concatenate(rows)],
        labels=found.labels[np.concatenate(rows)],
    )
    repeated = evaluate_with_pycocotools(longer, Truth(objects=[truth.objects[i] for i in copies], labels=truth.labels))
    # Ties between hits and misses are broken by order, which copies change: hence not to the last digit.
    assert resampled_ap50(evaluation, draws) == pytest.approx([repeated.stats[1]], abs=0.01)


def test_the_interval_holds_the_figure():
    found, truth = random_case(2, images=30)
    figures = average_precision(found, truth, resamples=200)
    assert figures["ap50_low"] < figures["ap50"] < figures["ap50_high"]


def test_masks_are_compared_by_their_pixels():
    square, half = np.zeros((2, 1, 200, 200), dtype=bool)
    square[:, :40, :40], half[:, :40, :16] = True, True
    truth = Truth(objects=[image(SQUARE)], labels={"a": 1}, masks=[encode_masks(square)])
    same_box = table((0, SQUARE, 0.9, 1))

    def with_mask(mask: np.ndarray) -> DetectionTable:
        columns = {name: getattr(same_box, name) for name in ("image", "boxes_xyxy", "scores", "labels")}
        return DetectionTable(**columns, masks=tuple(encode_masks(mask)))

    assert average_precision(with_mask(square), truth)["ap"] == pytest.approx(1.0)
    assert average_precision(with_mask(half), truth)["ap50"] == 0.0


def gathered_on_rank(rank: int, world_size: int) -> dict:
    found, _ = random_case(0)
    mine = (
        found.image % 3 == rank if rank < 2 else np.zeros(len(found.image), dtype=bool)
    )  # the last rank found nothing
    masks = tuple(bytes([65 + i % 7]) * (i % 5) for i in np.flatnonzero(mine))
    names = ("image", "boxes_xyxy", "scores", "labels")
    whole = gather_table(DetectionTable(**{n: getattr(found, n)[mine] for n in names}, masks=masks))
    return {
        "image": whole.image.tolist(),
        "sum": float(whole.boxes_xyxy.sum()),
        "masks": [m.hex() for m in whole.masks],
    }


def test_every_rank_gets_the_rows_of_all(tmp_path):
    ranks = run_on_ranks(gathered_on_rank, 3, tmp_path)
    found, _ = random_case(0)
    expected = [i for rank in range(2) for i in found.image[found.image % 3 == rank].tolist()]
    assert ranks[0]["image"] == ranks[1]["image"] == ranks[2]["image"] == expected
    assert ranks[0]["sum"] == pytest.approx(float(found.boxes_xyxy[found.image % 3 != 2].sum()))
    order = [i for rank in range(2) for i in np.flatnonzero(found.image % 3 == rank)]
    assert ranks[2]["masks"] == [(bytes([65 + i % 7]) * (i % 5)).hex() for i in order]
