"""`SubsetPlan`: the sample plan over some of a dataset's rows, such as low-label fractions or images with objects."""

import numpy as np

from workloads.data.loading.sample_plan import SamplePlan
from workloads.errors import ConfigError


class SubsetPlan(SamplePlan):
    """A `SamplePlan` of the selected rows, with all its guarantees for those.

    Its memory grows with the number of images, which a detector's annotations do anyway.

    Args:
        rows_per_group: int (groups,), of the whole dataset.
        selected: bool (images,), in the dataset's order.

    Raises:
        ConfigError: fewer selected images than one batch, or lanes that do not divide the batch.
    """

    def __init__(
        self,
        rows_per_group: np.ndarray,
        selected: np.ndarray,
        *,
        dataset_sha256: str,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
    ) -> None:
        counts = np.add.reduceat(selected, np.cumsum(rows_per_group) - rows_per_group, dtype=np.int64)
        self._groups = np.flatnonzero(counts)
        self._starts = np.cumsum(counts[self._groups]) - counts[self._groups]
        first = np.repeat(np.cumsum(rows_per_group) - rows_per_group, rows_per_group)
        self._in_group = (np.arange(len(selected)) - first)[selected]
        if not len(self._groups):
            raise ConfigError(
                "no image has an object to train on; give boxes, or a dataset that was built with objects"
            )
        super().__init__(
            counts[self._groups],
            dataset_sha256=dataset_sha256,
            seed=seed,
            global_batch_size=global_batch_size,
            lanes=lanes,
        )

    def share(self, epoch: int, batch: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._in_dataset(*super().share(epoch, batch, rank, world_size))

    def open_groups(self, epoch: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        return self._groups[super().open_groups(epoch, batch, rank, world_size)]

    def remainder(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._in_dataset(*super().remainder(epoch))

    def _in_dataset(
        self, positions: np.ndarray, group: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return positions, self._groups[group], self._in_group[self._starts[group] + row]
