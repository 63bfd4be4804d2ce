"""`TrainLoader` and `EvalLoader`: decoded batches in the order of the sample plan, and of the dataset."""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from workloads.data.loading.pipeline import DataConfig, Pipeline, Share
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.store.manifest import Dataset
from workloads.errors import DataError
from workloads.types import ImageBatch

_log = logging.getLogger(__name__)


class TrainLoader:
    """One rank's batches in the plan's order, epoch after epoch, from any step on.

    Args:
        regions: name of the column of region masks that comes with the images; None: none.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: SamplePlan,
        config: DataConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        regions: str | None = None,
    ) -> None:
        self._pipeline = Pipeline(dataset, config, regions=regions)
        self.plan, self._rank, self._world_size = plan, rank, world_size
        self._max_bad_share = config.max_bad_share
        lanes = plan.lanes_of(rank, world_size)
        self._rows_per_epoch = plan.steps_per_epoch * plan.global_batch_size // plan.lanes * len(lanes)
        self.bad_rows = 0
        """Rows that did not decode, cumulative."""

    @property
    def wait_seconds(self) -> float:
        """Time the consumer has waited for batches, cumulative."""
        return self._pipeline.wait_seconds

    def iterate(self, start_step: int = 0) -> Iterator[ImageBatch]:
        """Batches from global step `start_step` on, without end; closing the iterator stops its threads.

        Raises:
            DataError: a shard cannot be read, or more rows than `max_bad_share` of an epoch did not decode.
        """
        bad: list[str] = []
        epoch = -1
        with self._pipeline.run(self._shares(start_step)) as batches:
            for batch in batches:
                if batch.epoch != epoch:
                    epoch, bad = batch.epoch, []
                undecodable = [batch.image_ids[i] for i in torch.nonzero(~batch.valid).flatten().tolist()]
                if undecodable:
                    _log.warning("epoch %d: rows that do not decode are masked: %s", epoch, ", ".join(undecodable))
                bad += undecodable
                self.bad_rows += len(undecodable)
                if len(bad) > self._max_bad_share * self._rows_per_epoch:
                    raise DataError(
                        f"{len(bad)} rows of epoch {epoch} do not decode, more than data.max_bad_share="
                        f"{self._max_bad_share} allows: {', '.join(bad[:5])}; run `orchestrator data verify`"
                    )
                yield batch

    def _shares(self, start_step: int) -> Iterator[Share]:
        for step in itertools.count(start_step):
            epoch, batch = divmod(step, self.plan.steps_per_epoch)
            where = (epoch, batch, self._rank, self._world_size)
            positions, row_group, row_in_group = self.plan.share(*where)
            yield Share(
                epoch=epoch,
                positions=positions,
                row_group=row_group,
                row_in_group=row_in_group,
                open_groups=self.plan.open_groups(*where),
                size=len(positions),
            )


class EvalLoader:
    """Every image once over all ranks, in the dataset's order; all ranks have the same number of batches.

    A rank's rows are contiguous. Padding rows are not valid, their id is "" and their position −1.

    Args:
        wanted: ids of the images that are decoded; the other rows are not valid. None: all.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        wanted: frozenset[str] | None = None,
    ) -> None:
        self._dataset = dataset
        self._pipeline = Pipeline(dataset, config, wanted=wanted)
        self.num_images = min(dataset.num_images, limit if limit is not None else dataset.num_images)
        """Images over all ranks."""
        per_rank = -(-self.num_images // world_size)
        self._rows = range(min(rank * per_rank, self.num_images), min((rank + 1) * per_rank, self.num_images))
        self._batch_size = batch_size
        self._num_batches = -(-per_rank // batch_size)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[ImageBatch]:
        with self._pipeline.run(self._shares()) as batches:
            yield from batches

    def _shares(self) -> Iterator[Share]:
        ends = np.cumsum(self._dataset.row_groups.rows, dtype=np.int64)
        for batch in range(self._num_batches):
            first = self._rows.start + batch * self._batch_size
            positions = np.arange(first, min(first + self._batch_size, self._rows.stop), dtype=np.int64)
            groups = np.searchsorted(ends, positions, side="right")
            in_group = positions - ends[groups] + self._dataset.row_groups.rows[groups]
            yield Share(
                epoch=0,
                positions=positions,
                row_group=groups,
                row_in_group=in_group,
                open_groups=np.unique(groups),
                size=self._batch_size,
            )
