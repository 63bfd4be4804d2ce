"""Reads the table of hits that an evaluation leaves beside its figures."""

import io

import numpy as np

from workloads.metrics.grid_accuracy import SUITES


def hits_of(table_npz: bytes) -> dict[str, np.ndarray]:
    """Suite → hits (N, K) of an evaluation's table as `workloads` writes it, images in order."""
    with np.load(io.BytesIO(table_npz), allow_pickle=False) as arrays:
        return {suite: arrays[f"{suite}/sga"].astype(np.float64) for suite in SUITES}
