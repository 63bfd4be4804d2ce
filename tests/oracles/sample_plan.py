"""Restates the sample plan row by row in plain Python."""

import hashlib

from workloads.data.loading.sample_plan import BLOCK_GROUPS, WINDOW_GROUPS

Row = tuple[int, int]
"""(row group, row in it)"""


def epoch_order(rows_per_group: list[int], *, dataset_sha256: str, seed: int, lanes: int, epoch: int) -> list[Row]:
    """Every row of the dataset, at its position in the epoch."""

    def shuffled(items: list, purpose: str) -> list:
        digest = hashlib.sha256(f"{dataset_sha256}:{seed}:{purpose}".encode()).digest()
        key = int.from_bytes(digest[:8], "little")
        return [items[i] for i in sorted(range(len(items)), key=lambda i: _mix(i + key))]

    blocks = [range(i, min(i + BLOCK_GROUPS, len(rows_per_group))) for i in range(0, len(rows_per_group), BLOCK_GROUPS)]
    sequence: list[Row] = []
    for block in shuffled(list(range(len(blocks))), f"blocks:{epoch}"):
        for group in shuffled(list(blocks[block]), f"groups:{epoch}:{block}"):
            sequence += [(group, row) for row in range(rows_per_group[group])]

    total = len(sequence)
    window = max(1, round(WINDOW_GROUPS * total / len(rows_per_group)))
    shuffled_lanes: list[list[Row]] = []
    taken = 0
    for lane in range(lanes):
        length = total // lanes + (1 if lane < total % lanes else 0)
        rows = sequence[taken : taken + length]
        taken += length
        stagger = lane * window // lanes
        lane_order: list[Row] = []
        number = 0
        while len(lane_order) < length:
            stop = (number + 1) * window - stagger
            lane_order += shuffled(rows[len(lane_order) : stop], f"window:{epoch}:{lane}:{number}")
            number += 1
        shuffled_lanes.append(lane_order)
    return [shuffled_lanes[g % lanes][g // lanes] for g in range(total)]


def _mix(x: int) -> int:
    wrap = (1 << 64) - 1
    x = x * 0x9E3779B97F4A7C15 & wrap
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & wrap
    x = (x ^ x >> 27) * 0x94D049BB133111EB & wrap
    return x ^ x >> 31
