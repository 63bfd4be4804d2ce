"""Pseudo-classes of found boxes: features of their crops, whitened and normalised, in K-means clusters (LOST, section 3.4)."""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from workloads.config import config


@config
class ClustersConfig:
    """Whether and how the boxes of the first method are grouped by what they show."""

    count: Annotated[int, Field(ge=2)] | None = None
    """Clusters; null: none, every box is an `object`. At least as many as there are classes."""
    crop_size: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the square that a box is stretched to for its feature, pixels."""
    starts: PositiveInt = 10
    """Random starts of K-means, of which the tightest stays."""
    seed: int = 0
    """Seed of K-means."""


def cluster(features: np.ndarray, settings: ClustersConfig) -> np.ndarray:
    """int64 (n,): the cluster of each of `features` (n, D), numbered from the largest to the smallest.

    Whitening divides every feature by its deviation over the boxes (a feature that never varies is left out); then each box's
    vector is given length 1. At most n clusters are made.

    Raises:
        ValueError: no clusters are asked for, or features are not finite.
    """
    from sklearn.cluster import KMeans

    if settings.count is None:
        raise ValueError("clusters.count: say how many clusters")
    if not np.isfinite(features).all():
        raise ValueError("features of boxes are not finite; check the trunk's weights")
    if not len(features):
        return np.zeros(0, dtype=np.int64)
    whitened = whitened_unit(features)
    distinct = len(np.unique(whitened, axis=0))
    found = KMeans(min(settings.count, distinct), n_init=settings.starts, random_state=settings.seed).fit(whitened)
    order = np.argsort(-np.bincount(found.labels_), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[found.labels_].astype(np.int64)


def whitened_unit(features: np.ndarray) -> np.ndarray:
    """float64 (n, D'): every feature divided by its deviation over the rows, every row then by its length."""
    features = np.asarray(features, dtype=np.float64)
    deviation = features.std(axis=0)
    varies = deviation > 1e-9 * max(1.0, float(np.abs(features).max(initial=0.0)))
    if not varies.any():
        return np.ones((len(features), 1))
    scaled = features[:, varies] / deviation[varies]
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)


def cluster_names(labels: np.ndarray) -> list[str]:
    """Categories for a detector, one a box: `cluster_003`."""
    return [f"cluster_{label:03d}" for label in labels.tolist()]
