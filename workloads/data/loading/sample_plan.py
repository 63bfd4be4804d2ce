"""`SamplePlan`: the order of training rows, a pure function of (dataset, seed, epoch), never of the number of workers.

Row groups are put in a seeded order. L lanes each own a contiguous range of the rows of that sequence, the first
N mod L lanes one row more than the others, and shuffle within windows of it. Position g of the epoch is row g // L of
lane g % L.

Two trade-offs make the plan small and fast to seek. Row groups are ordered in two levels, blocks of neighbouring row
groups and row groups within a block, so a permutation of all of them never exists: groups of one block stay near each
other in time, which costs nothing where rows were placed by hash, and keeps a lane within few shards. And rows are
shuffled within windows of about `WINDOW_GROUPS` row groups only, so a reader needs that much of each lane in memory.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from workloads.errors import ConfigError

MAX_DEFAULT_LANES = 64
BLOCK_GROUPS = 512
WINDOW_GROUPS = 2


def default_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch size that is not above 64."""
    return max(d for d in range(1, MAX_DEFAULT_LANES + 1) if global_batch_size % d == 0)


class SamplePlan:
    """The order of the rows of a dataset, epoch by epoch.

    Args:
        rows_per_group: int (groups,): number of rows of each row group, none of them empty.
        dataset_sha256: the manifest's hash.
        seed: the run's seed.
        global_batch_size: images a step takes over all ranks.
        lanes: divides `global_batch_size`; None: its largest divisor not above 64.

    Raises:
        ConfigError: fewer images than one batch, or lanes that do not divide the batch.
    """

    def __init__(
        self,
        rows_per_group: np.ndarray,
        *,
        dataset_sha256: str,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
    ) -> None:
        if global_batch_size < 1:
            raise ConfigError(f"global_batch_size={global_batch_size}: must be at least 1")
        self.lanes = default_lanes(global_batch_size) if lanes is None else lanes
        if self.lanes < 1 or global_batch_size % self.lanes:
            raise ConfigError(
                f"lanes={self.lanes}: must divide global_batch_size={global_batch_size}; "
                f"{default_lanes(global_batch_size)} would"
            )
        self._rows = np.ascontiguousarray(rows_per_group, dtype=np.int32)
        if len(self._rows) and int(self._rows.min()) < 1:
            raise ConfigError("rows_per_group: has an empty row group; build the dataset again")
        self.num_images = int(self._rows.sum(dtype=np.int64))
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = self.num_images // global_batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"global_batch_size={global_batch_size}: the dataset has only {self.num_images} images; "
                "lower it or use more images"
            )
        self._identity = f"{dataset_sha256}:{seed}"
        self._block_starts = np.arange(0, len(self._rows), BLOCK_GROUPS, dtype=np.int64)
        self._block_rows = np.add.reduceat(self._rows, self._block_starts, dtype=np.int64)
        mean_rows = self.num_images / len(self._rows)
        self._window = max(1, round(WINDOW_GROUPS * mean_rows))
        self._epoch = functools.lru_cache(maxsize=4)(self._compute_epoch)
        self._cache: dict[tuple[int, int, int], _Window] = {}  # by epoch, lane and number, the oldest first
        self._cache_size = 2 * self.lanes + 16

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The contiguous lanes of one rank.

        Raises:
            ConfigError: more ranks than lanes.
        """
        if world_size > self.lanes:
            raise ConfigError(
                f"{world_size} workers are more than the plan's {self.lanes} lanes; "
                "raise global_batch_size (or lanes) or use fewer workers"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank}: must be in 0 … {world_size - 1}")
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def share(self, epoch: int, batch: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One rank's rows of one global batch, by ascending position: (positions, row_group, row_in_group), int64 (n,).

        Raises:
            ConfigError: no such batch or rank.
        """
        lanes, first, per_lane = self._lanes_and_rows(batch, rank, world_size)
        rows = self._lane_rows(epoch, lanes, first, first + per_lane)
        positions = (first + np.arange(per_lane))[:, None] * self.lanes + np.arange(lanes.start, lanes.stop)
        return positions.reshape(-1), rows[0].reshape(-1), rows[1].reshape(-1)

    def open_groups(self, epoch: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        """The row groups of all windows that one rank has open during a batch, int64 (n,), distinct.

        A reader that holds these never fetches a row group twice for one lane's pass over it.
        """
        lanes, first, per_lane = self._lanes_and_rows(batch, rank, world_size)
        windows = self._windows_of(lanes, first, first + per_lane)
        return np.unique(np.concatenate([window.groups for window in self._windows(epoch, windows)]))

    def _lanes_and_rows(self, batch: int, rank: int, world_size: int) -> tuple[range, int, int]:
        """A rank's lanes, and the first row and the number of rows that a batch takes of each lane."""
        if not 0 <= batch < self.steps_per_epoch:
            raise ConfigError(f"batch {batch}: an epoch has {self.steps_per_epoch}")
        per_lane = self.global_batch_size // self.lanes
        return self.lanes_of(rank, world_size), batch * per_lane, per_lane

    def remainder(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The last N mod G positions of an epoch, not trained on: (positions, row_group, row_in_group), int64 (n,)."""
        positions = np.arange(self.steps_per_epoch * self.global_batch_size, self.num_images, dtype=np.int64)
        places = [divmod(position, self.lanes) for position in positions.tolist()]
        rows = [self._lane_rows(epoch, range(lane, lane + 1), row, row + 1)[:, :, 0] for row, lane in places]
        if not rows:
            return positions, positions.copy(), positions.copy()
        groups, in_group = np.concatenate(rows, axis=1)
        return positions, groups, in_group

    def _lane_start(self, lane: int) -> int:
        """Where a lane's range begins in the epoch's sequence of rows."""
        return lane * (self.num_images // self.lanes) + min(lane, self.num_images % self.lanes)

    def _stagger(self, lane: int) -> int:
        # Lanes enter their windows at different times, so that reading is spread evenly over the steps.
        return lane * self._window // self.lanes

    def _windows_of(self, lanes: range, start: int, stop: int) -> list[tuple[int, int]]:
        """(lane, number) of the windows that hold rows start … stop of some lanes."""
        return [
            (lane, number)
            for lane in lanes
            for stagger in (self._stagger(lane),)
            for number in range((start + stagger) // self._window, (stop - 1 + stagger) // self._window + 1)
        ]

    def _lane_rows(self, epoch: int, lanes: range, start: int, stop: int) -> np.ndarray:
        """Rows start … stop of some lanes' shuffled orders: int64 (2, n, lanes), row group and row in it."""
        rows = np.empty((2, stop - start, len(lanes)), dtype=np.int64)
        windows = self._windows_of(lanes, start, stop)
        for (lane, _), window in zip(windows, self._windows(epoch, windows), strict=True):
            begin, end = max(start, window.start), min(stop, window.stop)
            rows[:, begin - start : end - start, lane - lanes.start] = window.rows[
                :, begin - window.start : end - window.start
            ]
        return rows

    def _windows(self, epoch: int, windows: list[tuple[int, int]]) -> list["_Window"]:
        """Windows by (lane, number), from the cache where they are in it."""
        missing = [where for where in windows if (epoch, *where) not in self._cache]
        if missing:
            computed = self._compute_windows(epoch, missing)
            self._cache |= {(epoch, *where): window for where, window in zip(missing, computed, strict=True)}
        result = [self._cache[epoch, *where] for where in windows]
        too_many = len(self._cache) - max(self._cache_size, 2 * len(windows))
        for oldest in list(self._cache)[:too_many] if too_many > 0 else ():
            del self._cache[oldest]
        return result

    def _compute_windows(self, epoch: int, windows: list[tuple[int, int]]) -> list["_Window"]:
        # All at once: a seek needs a window or two of every lane, and numpy's overhead per call exceeds the work.
        lane_starts = [self._lane_start(lane) for lane, _ in windows]
        begins = [number * self._window - self._stagger(lane) for lane, number in windows]
        lengths = [self._lane_start(lane + 1) - self._lane_start(lane) for lane, _ in windows]
        starts = [max(0, begin) for begin in begins]
        stops = [min(begin + self._window, length) for begin, length in zip(begins, lengths, strict=True)]
        sizes = np.array(stops) - np.array(starts)
        ends = np.cumsum(sizes)
        firsts = np.array(lane_starts) + np.array(starts)
        sequence = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(firsts - (ends - sizes), sizes)
        rows = self._sequence_rows(epoch, sequence)
        keys = [self._key(f"window:{epoch}:{lane}:{number}") for lane, number in windows]
        orders = _permutations(sizes, keys)
        result = []
        for start, stop, end, order in zip(starts, stops, ends.tolist(), orders, strict=True):
            own = rows[:, end - (stop - start) : end]
            # Neighbours in the sequence are of one row group, so its first row is enough to list it.
            groups = own[0, np.flatnonzero(np.diff(own[0], prepend=-1))]
            result.append(_Window(start=start, stop=stop, rows=own[:, order], groups=groups))
        return result

    def _sequence_rows(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Rows of the epoch's unshuffled sequence: int64 (2, n), row group and row in it."""
        order, ends = self._epoch(epoch)
        places = np.searchsorted(ends, rows, side="right")
        needed, which = np.unique(places, return_inverse=True)
        groups, group_ends = self._blocks(epoch, order[needed])
        in_block = rows - (ends - self._block_rows[order])[places]
        # One search through all blocks: each block's rows are numbered above those of the blocks before it.
        above = np.arange(len(needed), dtype=np.int64) * (int(self._block_rows.max()) + 1)
        index = np.searchsorted((group_ends + above[:, None]).reshape(-1), in_block + above[which], side="right")
        group = groups.reshape(-1)[index]
        return np.stack([group, in_block - group_ends.reshape(-1)[index] + self._rows[group]])

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks and where each ends in its sequence of rows."""
        order = self._permutation(len(self._block_rows), f"blocks:{epoch}")
        return order, np.cumsum(self._block_rows[order])

    def _blocks(self, epoch: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks' row groups in their order and where each ends in its block's rows: int64 (blocks, BLOCK_GROUPS).

        The last block may have fewer; its row is padded with ends equal to the block's.
        """
        starts = blocks * BLOCK_GROUPS
        sizes = np.minimum(starts + BLOCK_GROUPS, len(self._rows)) - starts
        keys = [self._key(f"groups:{epoch}:{block}") for block in blocks.tolist()]
        groups = np.zeros((len(blocks), int(sizes.max())), dtype=np.int64)
        rows = np.zeros_like(groups)
        for i, order in enumerate(_permutations(sizes, keys)):
            groups[i, : len(order)] = starts[i] + order
            rows[i, : len(order)] = self._rows[groups[i, : len(order)]]
        return groups, np.cumsum(rows, axis=1)

    def _permutation(self, n: int, purpose: str) -> np.ndarray:
        """A permutation of n, int64."""
        return _permutations(np.array([n]), [self._key(purpose)])[0]

    def _key(self, purpose: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._identity}:{purpose}".encode()).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class _Window:
    """A window of one lane: rows start … stop of the lane, shuffled."""

    start: int
    stop: int
    rows: np.ndarray  # int64 (2, stop - start): row group and row in it
    groups: np.ndarray  # int64: the row groups among them


def _permutations(sizes: np.ndarray, keys: list[int]) -> list[np.ndarray]:
    """One permutation of each size, int64; not by numpy's generator, whose streams may change between releases."""
    result: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(keys)
    seeds = np.array(keys, dtype=np.uint64)
    for size in np.unique(sizes).tolist():
        which = np.flatnonzero(sizes == size)
        # No two keys are equal, `_mix` being one to one, so the faster, unstable sort has one possible outcome.
        orders = np.argsort(_mix(np.arange(size, dtype=np.uint64) + seeds[which, None]), axis=1)
        for i, order in zip(which.tolist(), orders, strict=True):
            result[i] = order
    return result


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: uint64 to uint64, one to one."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
