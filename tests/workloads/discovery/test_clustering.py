"""Clusters of boxes: whitening as scipy's, the same whatever the features' scale, and few or equal boxes."""

import numpy as np
import pytest
import scipy.cluster.vq

from workloads.discovery.clustering import ClustersConfig, cluster, cluster_names, whitened_unit


def test_whitening_is_scipys() -> None:
    features = np.random.default_rng(0).normal(size=(30, 5)) * [1, 10, 0.1, 3, 5] + 2
    white = scipy.cluster.vq.whiten(features)
    np.testing.assert_allclose(whitened_unit(features), white / np.linalg.norm(white, axis=1, keepdims=True))


def test_groups_are_found_whatever_their_scale_and_order() -> None:
    rng = np.random.default_rng(1)
    centres = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5]])
    kinds = np.repeat([0, 1, 2], [30, 20, 10])
    features = (centres[kinds] + rng.normal(scale=0.3, size=(60, 3))) * [1, 100, 0.01]
    order = rng.permutation(60)
    labels = cluster(features[order], ClustersConfig(count=3))
    np.testing.assert_array_equal(labels, kinds[order])  # the largest is number 0
    assert cluster_names(labels[:0]) == [] and cluster_names(np.array([0, 12])) == ["cluster_000", "cluster_012"]


def test_few_and_equal_boxes() -> None:
    assert cluster(np.zeros((0, 4)), ClustersConfig(count=5)).tolist() == []
    assert cluster(np.ones((7, 4)), ClustersConfig(count=5)).tolist() == [0] * 7
    assert sorted(cluster(np.eye(3), ClustersConfig(count=5)).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="not finite"):
        cluster(np.full((3, 2), np.nan), ClustersConfig(count=2))
