"""95 % intervals by drawing images again (the crops or objects of one image are not independent)."""

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weights float64 (R, N), how often each image was drawn, to (R,)."""


def interval(statistic: Statistic, images: int, *, seed: int, resamples: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of `statistic` over `resamples` draws of `images` images."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)
    low, high = np.nanpercentile(statistic(weights), [2.5, 97.5], method="nearest")
    return float(low), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """Σ numerator / Σ denominator, both float64 (N,), one entry an image."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ numerator) / (weights @ denominator)

    return statistic
