"""Computes 95 % bootstrap intervals (`interval`), resampling images: the crops or objects of one image are not independent."""

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weights float64 (R, N), how often each image was drawn, to (R,)."""

_LARGEST_CHUNK = 1 << 21
"""Numbers of one array that are held at a time: 16 MiB of float64."""


def interval(
    statistic: Statistic, images: int, *, seed: int, resamples: int, width: int | None = None
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of `statistic` over `resamples` draws of `images` images.

    Draws are made and evaluated in chunks, so memory does not grow with their number; the draws are those of one call.

    Args:
        width: numbers that `statistic` holds for each draw, where that is more than one an image.
    """
    generator = np.random.default_rng(seed)
    shares = np.full(images, 1 / images)
    rows = max(1, _LARGEST_CHUNK // max(1, images, width or 0))
    values = [
        statistic(generator.multinomial(images, shares, size=min(rows, resamples - done)).astype(np.float64))
        for done in range(0, resamples, rows)
    ]
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5], method="nearest")
    return float(low), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """Σ numerator / Σ denominator, both float64 (N,), one entry an image."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ numerator) / (weights @ denominator)

    return statistic
