"""Which row is trained on when: a pure function of (dataset, seed, epoch), never of the number of workers.

Row groups are put in a seeded order. L lanes each own a contiguous range of the rows of that sequence, the first
N mod L lanes one row more than the others, and shuffle within windows of it. Position g of the epoch is row g // L of
lane g % L.

Two trade-offs make the plan small and quick to seek. Row groups are ordered in two levels, blocks of neighbouring row
groups and row groups within a block, so no permutation of all of them is ever held: groups of one block stay near each
other in time, which costs nothing where rows were placed by hash, and keeps a lane within few shards. And rows are
shuffled within windows of about `WINDOW_GROUPS` row groups only, so a reader holds that much of each lane.
"""

import functools
import hashlib

import numpy as np

MAX_DEFAULT_LANES = 64
BLOCK_GROUPS = 512
WINDOW_GROUPS = 2


class PlanError(ValueError):
    """The numbers given cannot make a plan; the message names them and the fix."""


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
        PlanError: fewer images than one batch, or lanes that do not divide the batch.
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
            raise PlanError(f"global_batch_size={global_batch_size}: must be at least 1")
        self.lanes = default_lanes(global_batch_size) if lanes is None else lanes
        if self.lanes < 1 or global_batch_size % self.lanes:
            raise PlanError(
                f"lanes={self.lanes}: must divide global_batch_size={global_batch_size}; "
                f"{default_lanes(global_batch_size)} would"
            )
        self._rows = np.ascontiguousarray(rows_per_group, dtype=np.int32)
        if len(self._rows) and int(self._rows.min()) < 1:
            raise PlanError("rows_per_group: holds an empty row group; build the dataset again")
        self.num_images = int(self._rows.sum(dtype=np.int64))
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = self.num_images // global_batch_size
        if not self.steps_per_epoch:
            raise PlanError(
                f"global_batch_size={global_batch_size}: the dataset has only {self.num_images} images; "
                "lower it or use more images"
            )
        self._identity = f"{dataset_sha256}:{seed}"
        self._block_starts = np.arange(0, len(self._rows), BLOCK_GROUPS, dtype=np.int64)
        self._block_rows = np.add.reduceat(self._rows, self._block_starts, dtype=np.int64)
        mean_rows = self.num_images / len(self._rows)
        self._window = max(1, round(WINDOW_GROUPS * mean_rows))
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._block = functools.lru_cache(maxsize=2 * self.lanes + 16)(self._make_block)
        self._window_rows = functools.lru_cache(maxsize=4 * self.lanes + 16)(self._make_window_rows)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The contiguous lanes of one rank.

        Raises:
            PlanError: more ranks than lanes.
        """
        if world_size > self.lanes:
            raise PlanError(
                f"{world_size} workers are more than the plan's {self.lanes} lanes; "
                "raise global_batch_size (or lanes) or use fewer workers"
            )
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank}: must be in 0 … {world_size - 1}")
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def share(self, epoch: int, batch: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One rank's rows of one global batch, by ascending position: (positions, row_group, row_in_group), int64 (n,).

        Raises:
            PlanError: no such batch or rank.
        """
        if not 0 <= batch < self.steps_per_epoch:
            raise PlanError(f"batch {batch}: an epoch has {self.steps_per_epoch}")
        per_lane = self.global_batch_size // self.lanes
        first = batch * per_lane
        lanes = self.lanes_of(rank, world_size)
        parts = [self._lane_rows(epoch, lane, first, first + per_lane) for lane in lanes]
        rows = np.stack(parts, axis=2)  # (2, per_lane, lanes)
        positions = (first + np.arange(per_lane))[:, None] * self.lanes + np.arange(lanes.start, lanes.stop)
        return positions.reshape(-1), rows[0].reshape(-1), rows[1].reshape(-1)

    def open_groups(self, epoch: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        """The row groups of all windows that one rank has open during a batch, int64 (n,), distinct.

        A reader that holds these never fetches a row group twice for one lane's pass over it.
        """
        per_lane = self.global_batch_size // self.lanes
        first = batch * per_lane
        windows = [
            self._window_rows(epoch, lane, window)[0]
            for lane in self.lanes_of(rank, world_size)
            for window in range(self._window_of(lane, first), self._window_of(lane, first + per_lane - 1) + 1)
        ]
        return np.unique(np.concatenate(windows))

    def remainder(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The last N mod G positions of an epoch, not trained on: (positions, row_group, row_in_group), int64 (n,)."""
        positions = np.arange(self.steps_per_epoch * self.global_batch_size, self.num_images, dtype=np.int64)
        places = [divmod(position, self.lanes) for position in positions.tolist()]
        rows = [self._lane_rows(epoch, lane, row, row + 1) for row, lane in places]
        if not rows:
            return positions, positions.copy(), positions.copy()
        groups, in_group = np.concatenate(rows, axis=1)
        return positions, groups, in_group

    def _lane_start(self, lane: int) -> int:
        """Where a lane's range begins in the epoch's sequence of rows."""
        return lane * (self.num_images // self.lanes) + min(lane, self.num_images % self.lanes)

    def _window_of(self, lane: int, row: int) -> int:
        return (row + self._stagger(lane)) // self._window

    def _stagger(self, lane: int) -> int:
        # Lanes enter their windows at different times, so that reading is spread evenly over the steps.
        return lane * self._window // self.lanes

    def _lane_rows(self, epoch: int, lane: int, start: int, stop: int) -> np.ndarray:
        """Rows start … stop of a lane's shuffled order: int64 (2, n), row group and row in it."""
        parts = []
        while start < stop:
            window = self._window_of(lane, start)
            window_start = max(0, window * self._window - self._stagger(lane))
            rows = self._window_rows(epoch, lane, window)
            taken = rows[:, start - window_start : stop - window_start]
            parts.append(taken)
            start += taken.shape[1]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _make_window_rows(self, epoch: int, lane: int, window: int) -> np.ndarray:
        lane_start, lane_stop = self._lane_start(lane), self._lane_start(lane + 1)
        begin = window * self._window - self._stagger(lane)
        start = lane_start + max(0, begin)
        stop = min(lane_start + begin + self._window, lane_stop)
        rows = self._sequence_rows(epoch, start, stop)
        return rows[:, self._permutation(stop - start, f"window:{epoch}:{lane}:{window}")]

    def _sequence_rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows start … stop of the epoch's unshuffled sequence: int64 (2, n), row group and row in it."""
        order, ends = self._epoch(epoch)
        parts = []
        while start < stop:
            place = int(np.searchsorted(ends, start, side="right"))
            block_start = int(ends[place - 1]) if place else 0
            groups, group_ends = self._block(epoch, int(order[place]))
            rows = np.arange(start, min(stop, int(ends[place])), dtype=np.int64) - block_start
            index = np.searchsorted(group_ends, rows, side="right")
            in_group = rows - group_ends[index] + self._rows[groups[index]]
            parts.append(np.stack([groups[index], in_group]))
            start += len(rows)
        return np.concatenate(parts, axis=1)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks and where each ends in its sequence of rows."""
        order = self._permutation(len(self._block_rows), f"blocks:{epoch}")
        return order, np.cumsum(self._block_rows[order])

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's row groups in their order and where each ends in the block's rows."""
        start = int(self._block_starts[block])
        stop = min(start + BLOCK_GROUPS, len(self._rows))
        groups = start + self._permutation(stop - start, f"groups:{epoch}:{block}")
        return groups, np.cumsum(self._rows[groups], dtype=np.int64)

    def _permutation(self, n: int, purpose: str) -> np.ndarray:
        """A permutation of n, int64; not numpy's generator, whose streams may change between releases."""
        key = int.from_bytes(hashlib.sha256(f"{self._identity}:{purpose}".encode()).digest()[:8], "little")
        # No two keys are equal, `_mix` being one to one, so the quicker, unstable sort has one possible outcome.
        return np.argsort(_mix(np.arange(n, dtype=np.uint64) + np.uint64(key)))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: uint64 to uint64, one to one."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
