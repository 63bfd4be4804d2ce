"""Average precision by Pascal VOC's rules (`voc_precision`), for figures that stand beside papers that use VOC's evaluator.

What differs from COCO's AP: every detection of a class counts, not the best 100 of an image; a detection goes to the object that
it overlaps most, and is a false positive if that object was taken by a better-scored one; the IoU must be *above* the
threshold; any number of detections may lie on a difficult object and count neither way. VOC's "+ 1 pixel" belongs to its
inclusive coordinates: in the half-open boxes used here (x0 = xmin − 1, x1 = xmax) the same widths need no addition.

Source: the VOC development kit (`VOCevaldet.m`) and its port in detectron2, which LOST and DetCo used.
"""

from typing import Literal

import numpy as np

from workloads.metrics.average_precision import DetectionTable, Truth
from workloads.metrics.corloc import iou_of

THRESHOLDS = tuple(np.arange(50, 100, 5) / 100)
"""IoU thresholds that `voc_ap` is the mean over."""

Curve = Literal["area", "11_points"]
"""How a precision-recall curve becomes AP: its area (VOC 2010 and later), or the mean at recalls 0, .1 … 1 (VOC 2007)."""


def voc_precision(table: DetectionTable, truth: Truth, *, curve: Curve = "area") -> dict[str, float]:
    """`voc_ap` (mean over IoU .50 to .95), `voc_ap50`, `voc_ap75`, and `voc_ap50/CLASS` of each class that has an object.

    Crowd regions count as difficult objects. NaN where no class has an object that is not difficult.
    """
    by_class = {
        name: _class_precision(table, truth, name, label, curve) for name, label in sorted(truth.labels.items())
    }
    measured = {name: values for name, values in by_class.items() if not np.isnan(values[0])}
    if not measured:
        return {"voc_ap": float("nan"), "voc_ap50": float("nan"), "voc_ap75": float("nan")}
    mean = np.mean(list(measured.values()), axis=0)
    figures = {"voc_ap": mean.mean(), "voc_ap50": mean[0], "voc_ap75": mean[THRESHOLDS.index(0.75)]}
    figures |= {f"voc_ap50/{name}": values[0] for name, values in measured.items()}
    return {name: float(value) for name, value in figures.items()}


def _class_precision(table: DetectionTable, truth: Truth, name: str, label: int, curve: Curve) -> np.ndarray:
    """AP of one class at each of `THRESHOLDS`, float64 (10,); NaN without an object to find."""
    rows = np.flatnonzero(table.labels == label)
    rows = rows[np.argsort(-table.scores[rows], kind="stable")]
    by_image = np.argsort(table.image[rows], kind="stable")  # within an image still by falling score
    images = table.image[rows][by_image]
    positives, seen = 0, 0
    target = np.full(len(rows), -1)  # number of the object that each detection overlaps most, and their IoU
    iou = np.zeros(len(rows))
    free = np.zeros(len(rows), dtype=bool)  # whether that object is difficult
    for image, item in enumerate(truth.objects):
        mine = np.array([category == name for category in item.categories], dtype=bool)
        if not mine.any():
            continue
        difficult = (item.difficult | item.crowd)[mine]
        positives += int((~difficult).sum())
        places = by_image[slice(*np.searchsorted(images, [image, image + 1]))]
        if len(places):
            ious = iou_of(table.boxes_xyxy[rows[places]], item.boxes_xyxy[mine])
            best = ious.argmax(axis=1)
            iou[places] = ious.max(axis=1)
            target[places], free[places] = seen + best, difficult[best]
        seen += int(mine.sum())
    if positives == 0:
        return np.full(len(THRESHOLDS), np.nan)
    precisions = []
    for threshold in THRESHOLDS:
        covers = iou > threshold
        candidates = np.flatnonzero(covers & ~free)
        true = np.zeros(len(rows), dtype=bool)
        true[candidates[np.unique(target[candidates], return_index=True)[1]]] = (
            True  # the best-scored one of each object
        )
        hits = np.cumsum(true[~(covers & free)])
        recall, precision = hits / positives, hits / np.arange(1, len(hits) + 1)
        precisions.append(_area(recall, precision) if curve == "area" else _eleven_points(recall, precision))
    return np.array(precisions)


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the precision envelope."""
    envelope = np.maximum.accumulate(np.concatenate([precision, [0.0]])[::-1])[::-1]
    steps = np.diff(np.concatenate([[0.0], recall]))
    return float((steps * envelope[:-1]).sum())


def _eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    return float(np.mean([precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]))
