"""Matches clusters to classes by the Hungarian method (`fit_match`) and measures AP50 of each class (`matched_precision`).

The match is fitted on training images. Where there are more clusters than classes, those without a class are dropped, and
their boxes with them.
"""

from collections.abc import Mapping

import numpy as np

from workloads.data.store.annotations import Annotations
from workloads.data.store.objects import Objects
from workloads.discovery.pseudo_boxes import BoxTable
from workloads.metrics.average_precision import DetectionTable, Truth, evaluate_with_pycocotools
from workloads.metrics.corloc import CorLocConfig, iou_of


def fit_match(
    boxes: BoxTable, truth: Mapping[str, Annotations], settings: CorLocConfig | None = None
) -> dict[str, str]:
    """Cluster → class, so that as many boxes as possible lie on an object of the class of their cluster.

    A box counts for the class of the object that it overlaps most, if it covers it (IoU as for CorLoc). No class has two
    clusters, no cluster two classes; pairs without a single box are left out.
    """
    from scipy.optimize import linear_sum_assignment

    settings = settings or CorLocConfig()
    clusters = sorted(set(boxes.categories))
    classes = sorted({name for item in truth.values() for name in item.categories})
    counts = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    for row, image_id in enumerate(boxes.image_ids):
        item = truth.get(image_id)
        if item is None or not len(item.boxes_xyxy):
            continue
        box, objects = boxes.boxes_xyxy[row][None], item.boxes_xyxy.astype(np.float64)
        overlap = iou_of(box, objects)[0]
        best = int(overlap.argmax())
        if overlap[best] >= settings.iou:
            counts[clusters.index(boxes.categories[row]), classes.index(item.categories[best])] += 1
    chosen = zip(*linear_sum_assignment(-counts), strict=True)
    return {clusters[c]: classes[k] for c, k in chosen if counts[c, k] > 0}


def matched_precision(boxes: BoxTable, truth: Mapping[str, Annotations], match: Mapping[str, str]) -> dict[str, float]:
    """AP50 of every class that has an object in `truth`, by name, and their mean as `mean`; a class without a cluster has 0.

    Args:
        boxes: of clusters. match: from `fit_match`.
    """
    ids = sorted(truth)
    place = {image_id: i for i, image_id in enumerate(ids)}
    classes = sorted({name for item in truth.values() for name in item.categories})
    labels = {name: label for label, name in enumerate(classes, start=1)}
    rows = [
        row
        for row, image_id in enumerate(boxes.image_ids)
        if image_id in place and match.get(boxes.categories[row]) in labels
    ]
    table = DetectionTable(
        image=np.array([place[boxes.image_ids[row]] for row in rows], dtype=np.int64),
        boxes_xyxy=boxes.boxes_xyxy[rows],
        scores=boxes.scores[rows],
        labels=np.array([labels[match[boxes.categories[row]]] for row in rows], dtype=np.int64),
    )
    objects = [
        Objects(
            size_hw=item.size_hw,
            boxes_xyxy=item.boxes_xyxy,
            categories=item.categories,
            crowd=item.crowd,
            difficult=item.difficult,
        )
        for item in (truth[image_id] for image_id in ids)
    ]
    evaluation = evaluate_with_pycocotools(table, Truth(objects=objects, labels=labels))
    # [IoU, recall, category, size, detections an image]: IoU .50, all sizes, 100 detections; −1 where nothing is asked for.
    at_half = evaluation.eval["precision"][0, :, :, 0, -1]
    figures = {name: float(at_half[:, i].mean()) for i, name in enumerate(classes) if (at_half[:, i] >= 0).all()}
    return {**figures, "mean": float(np.mean(list(figures.values()))) if figures else float("nan")}
