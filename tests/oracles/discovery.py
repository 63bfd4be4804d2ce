"""Restates LOST and TokenCut one image and one patch at a time, in the order of the papers' steps."""

import itertools

import numpy as np
import scipy.linalg


def lost_box(features: np.ndarray, grid_hw: tuple[int, int], k: int) -> tuple[int, int, int, int] | None:
    """The box in cells, or None where a similarity or a vote lies so near to zero that rounding would decide."""
    h, w = grid_hw
    n = h * w
    similarity = [[float(np.dot(features[p], features[q])) for q in range(n)] for p in range(n)]
    scale = max(abs(s) for row in similarity for s in row) or 1.0
    near = 1e-4 if features.dtype == np.float32 else 1e-11
    if any(0 < abs(s) < near * scale for row in similarity for s in row):
        return None
    degree = [sum(1 for q in range(n) if q != p and similarity[p][q] > 0) for p in range(n)]
    seed = min(range(n), key=lambda p: (degree[p], p))
    lowest = sorted(range(n), key=lambda p: (degree[p], p))[:k]
    voters = [q for q in lowest if similarity[seed][q] > 0]
    votes = [sum(similarity[s][q] for s in voters) for q in range(n)]
    if any(0 < abs(vote) < near * scale * max(1, len(voters)) for vote in votes):
        return None
    return flood_box({q for q in range(n) if votes[q] > 0}, seed, grid_hw)


def flood_box(members: set[int], seed: int, grid_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box of the 4-connected part of `members` that holds `seed`, by walking to the neighbours."""
    h, w = grid_hw
    reached, front = {seed}, [seed]
    while front:
        row, column = divmod(front.pop(), w)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            cell = r * w + c
            if 0 <= r < h and 0 <= c < w and cell in members and cell not in reached:
                reached.add(cell)
                front.append(cell)
    rows, columns = [cell // w for cell in reached], [cell % w for cell in reached]
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def tokencut_box(
    features: np.ndarray, grid_hw: tuple[int, int], tau: float, eps: float
) -> tuple[int, int, int, int] | None:
    """The box in cells by scipy's generalised eigensolver, or None where the cut is not clear enough to be unique."""
    n = len(features)
    unit = [f / max(np.linalg.norm(f), 1e-12) for f in features.astype(np.float64)]
    weights = np.empty((n, n))
    for p, q in itertools.product(range(n), range(n)):
        cosine = float(np.dot(unit[p], unit[q]))
        if abs(cosine - tau) < 1e-6:
            return None
        weights[p, q] = 1.0 if cosine > tau else eps
    degrees = np.diag(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degrees - weights, degrees)
    second = vectors[:, 1]
    clear = np.sort(np.abs(second))
    gap = min(values[1] - values[0], values[2] - values[1]) if n > 2 else values[1] - values[0]
    if gap < 1e-8 or clear[-1] - clear[-2] < 1e-7 or np.abs(second - second.mean()).min() < 1e-7:
        return None
    seed = int(np.argmax(np.abs(second)))
    above = second > second.mean()
    return flood_box({q for q in range(n) if above[q] == above[seed]}, seed, grid_hw)
