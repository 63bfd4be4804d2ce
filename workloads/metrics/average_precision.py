"""Computes average precision by COCO's conventions with pycocotools (`average_precision`): AP over IoU .50:.95, AP50, AP75, …

At most 100 detections an image count; a crowd region takes any number of detections and asks for none, as does a difficult
object, which takes one. Sizes are those of the boxes (of the masks, for masks): shards keep no segmentation's area.
"""

import contextlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workloads.data.store.objects import Objects
from workloads.metrics.bootstrap import interval
from workloads.parallel.distributed import gather_rows

FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""pycocotools' twelve figures, in its order; NaN where there is no object of the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionTable:
    """Detections of many images, row by row."""

    image: np.ndarray  # int64 (n,): the image's place in the dataset's order
    boxes_xyxy: np.ndarray  # float64 (n, 4), pixels of the upright source image
    scores: np.ndarray  # float64 (n,)
    labels: np.ndarray  # int64 (n,)
    masks: tuple[bytes, ...] | None = None  # COCO's compressed run lengths over the source image


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The objects that detections are compared with."""

    objects: Sequence[Objects]  # of each image, in the dataset's order
    labels: Mapping[str, int]  # category → label
    masks: Sequence[Sequence[bytes]] | None = None  # of each image's objects, COCO's compressed run lengths


def average_precision(table: DetectionTable, truth: Truth, *, resamples: int = 0, seed: int = 0) -> dict[str, float]:
    """`FIGURES` of the detections, and with `resamples` the interval of AP50: `ap50_low`, `ap50_high`.

    The interval is a 95 % bootstrap over images, whose objects are not independent of each other.

    Args:
        table: of each image, the 100 best count.
    """
    evaluation = evaluate_with_pycocotools(table, truth)
    figures = {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    figures = {name: value if value >= 0 else float("nan") for name, value in figures.items()}
    if resamples:
        low, high = interval(
            lambda weights: resampled_ap50(evaluation, weights),
            len(truth.objects),
            seed=seed,
            resamples=resamples,
            width=int(np.bincount(table.labels, minlength=1).max()),  # detections of one category
        )
        figures |= {"ap50_low": low, "ap50_high": high}
    return figures


def evaluate_with_pycocotools(table: DetectionTable, truth: Truth) -> Any:
    """pycocotools' `COCOeval`, evaluated, accumulated and summarised; it prints nothing.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):
        def _prepare(self) -> None:
            super()._prepare()
            for objects in self._gts.values():
                for item in objects:
                    item["ignore"] = int(item["ignore"] or item["difficult"])

    true, detected = COCO(), COCO()
    images = [{"id": i, "height": item.size_hw[0], "width": item.size_hw[1]} for i, item in enumerate(truth.objects)]
    categories = [{"id": label, "name": name} for name, label in truth.labels.items()]
    true.dataset = {"images": images, "categories": categories, "annotations": _true_rows(truth)}
    detected.dataset = {"images": images, "categories": categories, "annotations": _detected_rows(table, truth)}
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        detected.createIndex()
        evaluation = Evaluation(true, detected, "bbox" if table.masks is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _true_rows(truth: Truth) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image, item in enumerate(truth.objects):
        sides = (item.boxes_xyxy[:, 2:] - item.boxes_xyxy[:, :2]).astype(np.float64)
        for k, (width, height) in enumerate(sides.tolist()):
            row = {
                "id": len(rows) + 1,  # pycocotools takes 0 for "no match"
                "image_id": image,
                "category_id": truth.labels[item.categories[k]],
                "bbox": [*item.boxes_xyxy[k, :2].tolist(), width, height],
                "area": width * height,
                "iscrowd": int(item.crowd[k]),
                "difficult": bool(item.difficult[k]),
            }
            if truth.masks is not None:
                row |= _mask_columns(truth.masks[image][k], item.size_hw)
            rows.append(row)
    return rows


def _detected_rows(table: DetectionTable, truth: Truth) -> list[dict[str, Any]]:
    xywh = np.concatenate([table.boxes_xyxy[:, :2], table.boxes_xyxy[:, 2:] - table.boxes_xyxy[:, :2]], axis=1)
    columns = zip(table.image.tolist(), table.labels.tolist(), xywh.tolist(), table.scores.tolist(), strict=True)
    rows = []
    for i, (image, label, box, score) in enumerate(columns):
        row = {
            "id": i + 1,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "score": score,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        if table.masks is not None:
            row |= _mask_columns(table.masks[i], truth.objects[image].size_hw)
        rows.append(row)
    return rows


def _mask_columns(counts: bytes, size_hw: tuple[int, int]) -> dict[str, Any]:
    from pycocotools import mask

    encoded = {"size": list(size_hw), "counts": counts}
    return {"segmentation": encoded, "area": float(mask.area(encoded))}


def encode_masks(masks: np.ndarray) -> list[bytes]:
    """COCO's compressed run lengths of bool (n, H, W) masks."""
    from pycocotools import mask

    columns = np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0))
    return [item["counts"] for item in mask.encode(columns)]


def resampled_ap50(evaluation: Any, weights: np.ndarray) -> np.ndarray:
    """AP50 with each image counted as often as `weights` (R, images) say, float64 (R,), from the matches already made.

    An image that counts twice has its objects and its detections twice; a category that is not drawn does not count.
    """
    drawn = weights.astype(np.int64)
    resamples = len(drawn)
    per_category: dict[int, list[Any]] = {}
    for item in evaluation.evalImgs:
        if item is not None and item["aRng"] == evaluation.params.areaRng[0]:
            per_category.setdefault(item["category_id"], []).append(item)
    sums, counts = np.zeros(resamples), np.zeros(resamples)
    for items in per_category.values():
        precision, asked = _ap50_of(items, drawn, evaluation.params.recThrs)
        sums += np.where(asked, precision, 0.0)
        counts += asked
    return sums / np.maximum(counts, 1)


def _ap50_of(items: Sequence[Any], drawn: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One category's AP50 (R,) and whether any object of it was drawn (R,)."""
    image = np.array([item["image_id"] for item in items])
    wanted = np.array([int((np.asarray(item["gtIgnore"]) == 0).sum()) for item in items])
    total = drawn[:, image] @ wanted
    lengths = [len(item["dtScores"]) for item in items]
    scores = np.concatenate([np.asarray(item["dtScores"], dtype=np.float64) for item in items])
    order = np.argsort(-scores, kind="mergesort")
    counts = ~np.concatenate([np.asarray(item["dtIgnore"][0], dtype=bool) for item in items])[order]
    hits = np.concatenate([np.asarray(item["dtMatches"][0]) > 0 for item in items])[order] & counts
    weight = drawn[:, np.repeat(image, lengths)[order]]
    true, seen = np.cumsum(weight * hits, axis=1), np.cumsum(weight * counts, axis=1)
    if not len(scores):
        return np.zeros(len(drawn)), total > 0
    precision = np.maximum.accumulate((true / np.maximum(seen, 1))[:, ::-1], axis=1)[:, ::-1]
    recall = true / np.maximum(total, 1)[:, None]
    values = np.zeros(len(drawn))
    for row in range(len(drawn)):
        place = np.searchsorted(recall[row], recalls, side="left")
        values[row] = np.where(place < len(scores), precision[row, np.minimum(place, len(scores) - 1)], 0.0).mean()
    return values, total > 0


def gather_table(table: DetectionTable) -> DetectionTable:
    """The rows of all ranks, in rank order; every rank gets the same."""
    names = ("image", "boxes_xyxy", "scores", "labels")
    columns = {name: gather_rows(torch.from_numpy(getattr(table, name))).numpy() for name in names}
    masks = None
    if table.masks is not None:
        lengths = gather_rows(torch.tensor([len(m) for m in table.masks], dtype=torch.int64)).tolist()
        data = np.frombuffer(b"".join(table.masks), dtype=np.uint8).copy()
        joined = gather_rows(torch.from_numpy(data)).numpy().tobytes()
        ends = np.cumsum([0, *lengths]).tolist()
        masks = tuple(joined[start:stop] for start, stop in itertools.pairwise(ends))
    return DetectionTable(**columns, masks=masks)
