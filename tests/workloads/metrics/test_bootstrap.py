"""Bootstrap intervals: the same numbers whatever the chunk, and memory that does not grow with the number of draws."""

import tracemalloc

import numpy as np
import pytest

from workloads.metrics import bootstrap
from workloads.metrics.bootstrap import interval, ratio


def in_one_piece(statistic, images, *, seed, resamples):
    """The oracle: all draws at once."""
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    low, high = np.nanpercentile(statistic(weights.astype(np.float64)), [2.5, 97.5], method="nearest")
    return float(low), float(high)


@pytest.mark.parametrize("chunk", [1, 300, 64 * 37, 1 << 21])
def test_chunks_draw_the_same_images(monkeypatch, chunk):
    hits = np.random.default_rng(1).random(37)
    statistic = ratio(hits, np.ones(37))
    monkeypatch.setattr(bootstrap, "_LARGEST_CHUNK", chunk)
    assert interval(statistic, 37, seed=5, resamples=200) == pytest.approx(
        in_one_piece(statistic, 37, seed=5, resamples=200), rel=1e-12
    )


def test_memory_does_not_grow_with_the_number_of_draws():
    """50,000 images and 2,000 draws would be 1.6 GB at once; 300 draws, 240 MB, show the same in a test's time."""
    hits = np.random.default_rng(1).random(50_000)
    tracemalloc.start()
    interval(ratio(hits, np.ones(50_000)), 50_000, seed=5, resamples=300)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 << 20


def test_a_statistic_that_holds_more_is_given_fewer_draws_at_a_time(monkeypatch):
    monkeypatch.setattr(bootstrap, "_LARGEST_CHUNK", 1000)
    rows = []

    def statistic(weights):
        rows.append(len(weights))
        return weights.mean(1)

    interval(statistic, 10, seed=5, resamples=12, width=200)
    assert rows == [5, 5, 2]
