"""kNN and the linear probe against scikit-learn and hand cases; the choice of images; intervals."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.workloads.data.views.test_crops import batch_of
from workloads.data.views.counter_random import text_keys
from workloads.errors import ConfigError
from workloads.metrics.representation import (
    RepresentationConfig,
    accuracy,
    choose_split,
    extract,
    linear_probe,
    nearest_neighbours,
    paired_gain,
)

SETTINGS = RepresentationConfig(train_uri="x", per_class=3, bootstrap=200)


def clusters(per_class=20, classes=4, dim=6, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    labels = np.repeat(np.arange(classes), per_class)
    return (centres[labels] + spread * rng.normal(size=(len(labels), dim))).astype(np.float32), labels


def test_neighbours_vote_as_scikit_learns_do():
    train, labels = clusters(seed=0)
    test, _ = clusters(seed=1)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731

    def weights(distances):  # of unit vectors, d² = 2 − 2 cos
        return np.exp((1 - distances**2 / 2) / 0.07)

    theirs = KNeighborsClassifier(7, weights=weights).fit(unit(train), labels).predict(unit(test))
    ours = nearest_neighbours(train, labels, test, neighbours=7, temperature=0.07)
    assert np.array_equal(ours, theirs)


def test_one_near_neighbour_outvotes_two_far_ones_and_a_small_temperature_does_not_overflow():
    train = np.array([[1, 0], [0.5, 0.9], [0.5, 0.9]], dtype=np.float32)
    test = np.array([[1, 0.05]], dtype=np.float32)
    labels = np.array([1, 0, 0])
    assert nearest_neighbours(train, labels, test, neighbours=3, temperature=0.07).tolist() == [1]
    assert nearest_neighbours(train, labels, test, neighbours=3, temperature=10.0).tolist() == [0]
    assert nearest_neighbours(train, labels, test, neighbours=99, temperature=1e-4).tolist() == [1]


def test_a_linear_probe_separates_what_a_line_separates_whatever_the_features_scales():
    train, labels = clusters(spread=0.3)
    test, _ = clusters(spread=0.3)
    scales = np.array([1e-3, 1, 1e3, 1, 1, 1], dtype=np.float32)
    assert (linear_probe(train * scales, labels, test * scales, seed=0) == labels).mean() > 0.95
    shuffled = np.random.default_rng(0).permutation(labels)
    assert (linear_probe(train, shuffled, test, seed=0) == labels).mean() < 0.6


def test_accuracy_is_the_mean_over_classes():
    labels = np.array([0, 0, 0, 1])
    hits = np.array([True, True, True, False])
    value, low, high = accuracy(hits, labels, SETTINGS)
    assert value == pytest.approx(0.5) and low <= value <= high
    gain, low, high = paired_gain(hits, ~hits, labels, SETTINGS)
    assert gain == pytest.approx(0.0) and low < 0 < high
    assert paired_gain(hits, hits, labels, SETTINGS) == (0.0, 0.0, 0.0)


def test_the_split_is_the_same_for_every_order_and_leaves_no_image_in_both_halves():
    labels = {f"{label}/{i}": label for label in ("a", "b") for i in range(5)}
    labels |= {"c/0": "c", "junk/0": "BACKGROUND_Google", "flat": None}
    split = choose_split(labels, None, SETTINGS)
    again = choose_split(dict(reversed(labels.items())), None, SETTINGS)
    assert split == again and split.classes == ("a", "b", "c")
    assert sorted(split.train.values()) == [0, 0, 0, 1, 1, 1, 2] and sorted(split.test.values()) == [0, 0, 1, 1]
    assert not set(split.train) & set(split.test)
    other = choose_split(labels, {"x": "b", "y": "unknown", "z": None}, SETTINGS)
    assert other.train == split.train and other.test == {"x": 1}


def test_features_are_of_the_wanted_and_readable_images_alone_and_do_not_see_the_canvas():
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    images[:, :, :32, :64] = torch.tensor([10, 60, 120, 250], dtype=torch.uint8)[:, None, None, None]
    batch = batch_of(images, [[32, 64]] * 4)
    batch.valid[3] = False
    wanted = frozenset(["image-0", "image-2", "image-3"])
    found = extract(lambda x: x.mean((-2, -1)), [batch], wanted, SETTINGS)
    assert found.image.tolist() == text_keys(("image-0", "image-2")).tolist()
    np.testing.assert_allclose(found.trunk, np.array([[10] * 3, [120] * 3]) / 255, atol=1e-4)
    assert found.pixel.shape == (2, 3 * 16 * 16)


def test_a_rank_without_a_wanted_image_asks_the_trunk_on_its_own_device():
    """The device "meta" refuses the host's tensors, as a GPU does."""
    trunk = torch.nn.Conv2d(3, 5, 1, device="meta")
    batch = batch_of(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [[64, 64]])
    nothing = extract(lambda x: trunk(x).mean((-2, -1)), [batch], frozenset(["nobody"]), SETTINGS, device="meta")
    assert nothing.trunk.shape == (0, 5) and nothing.image.shape == (0,)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [], [0, 0, 0, 0, 0, 0, 0]])
def test_too_few_images_for_a_linear_probe_are_refused_in_a_sentence(labels):
    features = np.zeros((len(labels), 3), np.float32)
    with pytest.raises(ConfigError, match=f"linear: {len(labels)} training images are too few .* linear=false"):
        linear_probe(features, np.array(labels, dtype=np.int64), features, seed=101)
