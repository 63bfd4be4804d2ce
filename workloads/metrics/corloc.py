"""Computes CorLoc, the share of images whose one box covers an object (`corloc_hits`, `corloc_figures`, `corloc_gain`).

The convention: boxes are half-open, `xyxy`, in pixels of the upright source image, so a box is x1 − x0 wide. An image is a
hit if the box's IoU with *any* of its objects is at least the threshold, computed in float64, in which an IoU of exactly 0.5
is 0.5 and counts. Images without an object that counts are left out; their number is reported. An image with objects and no
box is a miss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torchvision.ops import box_iou

from workloads.config import config
from workloads.data.store.annotations import Annotations
from workloads.metrics.bootstrap import interval
from workloads.metrics.figures import with_interval


@config
class CorLocConfig:
    """Which objects count, and how the interval is drawn."""

    iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """IoU from which a box covers an object."""
    crowd: bool = False
    """Whether COCO's crowd regions count as objects; LOST's figures are without."""
    difficult: bool = True
    """Whether VOC's difficult objects count; LOST's figures are with them."""
    seed: int = 2402
    """Seed of the bootstrap."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the images from which the 95 % intervals are read."""

    def counted(self, truth: Annotations) -> np.ndarray:
        """float64 (n, 4): the boxes of the objects that count."""
        keep = np.ones(len(truth.boxes_xyxy), dtype=bool)
        if not self.crowd:
            keep &= ~truth.crowd
        if not self.difficult:
            keep &= ~truth.difficult
        return truth.boxes_xyxy[keep].astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Whether each image that has objects was hit, in the order of its id."""

    image_ids: tuple[str, ...]
    hit: np.ndarray  # bool (n,)
    best_iou: np.ndarray  # float64 (n,): with any object; 0 where there is no box
    without_objects: int  # images left out


def iou_of(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU, float64 (n, m), of half-open xyxy boxes (n, 4) and (m, 4); 0 where neither has an area."""
    ours, theirs = (_upright(np.asarray(side, dtype=np.float64)) for side in (boxes, others))
    return box_iou(torch.from_numpy(ours), torch.from_numpy(theirs)).nan_to_num(0.0).numpy()


def _upright(boxes: np.ndarray) -> np.ndarray:
    """A box that ends before it begins has no area; torchvision would multiply two negative sides."""
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def corloc_hits(
    boxes: Mapping[str, np.ndarray], truth: Mapping[str, Annotations], settings: CorLocConfig | None = None
) -> Hits:
    """Compare each image's box with its objects.

    Args:
        boxes: image id → box, float64 (4,).
        truth: image id → annotations, of every image that was searched.
    """
    settings = settings or CorLocConfig()
    ids, best = [], []
    for image_id in sorted(truth):
        objects = settings.counted(truth[image_id])
        if not len(objects):
            continue
        ids.append(image_id)
        box = boxes.get(image_id)
        best.append(0.0 if box is None else float(iou_of(box[None], objects).max()))
    return Hits(
        image_ids=tuple(ids),
        hit=np.array(best, dtype=np.float64) >= settings.iou,
        best_iou=np.array(best, dtype=np.float64),
        without_objects=len(truth) - len(ids),
    )


def corloc_figures(hits: Hits, settings: CorLocConfig | None = None) -> dict[str, float]:
    """`corloc` with its 95 % interval over images, `mean_iou`, `images`, `images_without_objects`; of no image, the counts only."""
    settings = settings or CorLocConfig()
    n = len(hits.hit)
    if not n:
        return {"images": 0.0, "images_without_objects": float(hits.without_objects)}
    return {
        **with_interval("corloc", float(hits.hit.mean()), _interval(hits.hit, settings)),
        "mean_iou": float(hits.best_iou.mean()),
        "images": float(n),
        "images_without_objects": float(hits.without_objects),
    }


def corloc_gain(ours: Hits, theirs: Hits, settings: CorLocConfig | None = None) -> tuple[float, float, float]:
    """CorLoc of `ours` − `theirs` on the same images, and its 95 % interval."""
    settings = settings or CorLocConfig()
    if ours.image_ids != theirs.image_ids:
        raise ValueError("a paired difference needs hits of the same images")
    difference = ours.hit.astype(np.float64) - theirs.hit
    return (float(difference.mean()), *_interval(difference, settings))


def _interval(values: np.ndarray, settings: CorLocConfig) -> tuple[float, float]:
    """95 % interval of the mean of `values`, float64 (n,), one an image."""
    n = len(values)
    return interval(lambda weights: weights @ values / n, n, seed=settings.seed, resamples=settings.bootstrap)
