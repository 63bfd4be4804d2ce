"""Reads the table of hits that a grid-accuracy evaluation writes as an artifact (`hits_of`)."""

import io

import numpy as np

from workloads.metrics.grid_accuracy import SUITES


def hits_of(table_npz: bytes) -> dict[str, np.ndarray]:
    """Suite → hits float64 (N images, K crops) of a `grid_accuracy_step_*.npz` file, images in the order of their hashes."""
    with np.load(io.BytesIO(table_npz), allow_pickle=False) as arrays:
        return {suite: arrays[f"{suite}/sga"].astype(np.float64) for suite in SUITES}
