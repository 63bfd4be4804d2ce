"""Groups discovered boxes into pseudo-classes (`cluster`): K-means on whitened features of their crops (LOST, section 3.4)."""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from workloads.config import config


@config
class ClustersConfig:
    """Clustering of the first method's boxes by the features of their crops."""

    count: Annotated[int, Field(ge=2)] | None = None
    """Number of clusters, at least as many as there are classes; null: no clusters, every box is an `object`."""
    crop_size: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the square that a box is stretched to for its feature, pixels."""
    starts: PositiveInt = 10
    """Random initialisations of K-means, of which the one with the lowest inertia is used."""
    seed: int = 0
    """Seed of K-means."""


def cluster(features: np.ndarray, settings: ClustersConfig) -> np.ndarray:
    """int64 (n,): the cluster of each of `features` (n, D), numbered from the largest to the smallest.

    Whitening divides every feature by its deviation over the boxes (a feature that never varies is left out); then each box's
    vector is scaled to length 1. There are at most n clusters.

    Raises:
        ValueError: `settings.count` is null, or features are not finite.
    """
    from sklearn.cluster import KMeans

    if settings.count is None:
        raise ValueError("clusters.count: give the number of clusters")
    if not np.isfinite(features).all():
        raise ValueError("features of boxes are not finite; check the trunk's weights")
    if not len(features):
        return np.zeros(0, dtype=np.int64)
    whitened = whitened_unit(features)
    distinct = len(np.unique(whitened, axis=0))
    kmeans = KMeans(min(settings.count, distinct), n_init=settings.starts, random_state=settings.seed).fit(whitened)
    order = np.argsort(-np.bincount(kmeans.labels_), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[kmeans.labels_].astype(np.int64)


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
