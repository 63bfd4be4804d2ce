"""`DataConfig` and `Pipeline`: fetches row groups and decodes batches on thread pools, ahead of the step."""

import collections
import functools
import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from workloads.config import config
from workloads.data.loading.decode import decode_batch, decode_regions_batch
from workloads.data.store.disk_cache import DiskCache
from workloads.data.store.manifest import Dataset
from workloads.data.store.row_groups import RowGroup, RowGroupReader
from workloads.types import ImageBatch

_READ_AHEAD = 4


@config
class DataConfig:
    """The dataset that is read, and the threads, cache and decoding of the loader."""

    uri: str
    """Folder or s3:// URI of a dataset, as `orchestrator data build` writes it."""
    decode_size: PositiveInt | None = 256
    """Longer side, pixels, to which images are shrunk while decoding; none: source resolution."""
    dct_scaling: bool = False
    """Decode JPEGs of at least twice decode_size at 1/2, 1/4 or 1/8 of their size: faster, with slightly different pixels."""
    decode_device: str = "cpu"
    """Always cpu: CPU threads decode. Kept because it is part of the identity of runs that older releases began."""
    lanes: PositiveInt | None = None
    """Parallel streams of the sample plan; divides the global batch size; none: its largest divisor not above 64."""
    io_threads: PositiveInt = 8
    """Threads that fetch row groups."""
    decode_threads: PositiveInt = 2
    """Threads that decode images."""
    prefetch_batches: NonNegativeInt = 3
    """Batches prepared ahead of the one in use."""
    cache_dir: str | None = None
    """Local folder that caches row groups for later epochs, shared by the workers of a node; none: no cache."""
    cache_gib: PositiveFloat = 50.0
    """Size, GiB, above which the least recently used row groups are removed from the cache."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of an epoch's rows that may fail to decode before the run fails."""

    def __post_init__(self) -> None:
        if self.decode_device != "cpu":
            raise ValueError(
                f"data.decode_device: is {self.decode_device!r}, but images are decoded on CPU threads; remove the key"
            )


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's rows of one batch."""

    epoch: int
    positions: np.ndarray
    row_group: np.ndarray
    row_in_group: np.ndarray
    open_groups: np.ndarray  # needed by this batch or soon by later ones
    size: int  # rows of the batch; those beyond `positions` are padding


_Planned: TypeAlias = tuple[Share, dict[int, Future[RowGroup]]]
"""A share, and its row groups by number, being read."""


class Pipeline:
    """Turns shares into batches, in order, a few ahead of the consumer.

    One thread walks the plan and requests row groups early; each is released when no pending batch needs it.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        regions: str | None = None,
        wanted: frozenset[str] | None = None,
    ) -> None:
        cache = None
        if config.cache_dir is not None:
            cache = DiskCache(config.cache_dir, max_bytes=int(config.cache_gib * 2**30))
        self._reader = RowGroupReader(dataset, cache, regions=regions)
        self._regions, self._wanted = regions, wanted
        self._config = config
        self.decode = functools.partial(decode_batch, pinned=torch.cuda.is_available(), dct_scaling=config.dct_scaling)
        self.wait_seconds = 0.0

    def run(self, shares: Iterator[Share]) -> "_Run":
        return _Run(self, shares)


class _Run:
    """One pass of a pipeline: a context manager that owns the threads and gives the batches."""

    def __init__(self, pipeline: Pipeline, shares: Iterator[Share]) -> None:
        self._pipeline = pipeline
        self._config = pipeline._config
        self._shares = shares
        self._groups: weakref.WeakValueDictionary[int, Future[RowGroup]] = weakref.WeakValueDictionary()

    def __enter__(self) -> Iterator[ImageBatch]:
        self._plan_pool = ThreadPoolExecutor(1, "data-plan")
        self._io_pool = ThreadPoolExecutor(self._config.io_threads, "data-read")
        self._batch_pool = ThreadPoolExecutor(2, "data-batch")
        self._decode_pool = ThreadPoolExecutor(self._config.decode_threads, "data-decode")
        return self._batches()

    def __exit__(self, *_: object) -> None:
        for pool in (self._plan_pool, self._io_pool, self._decode_pool, self._batch_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._plan_pool, self._io_pool, self._decode_pool, self._batch_pool):
            pool.shutdown(wait=True)

    def _batches(self) -> Iterator[ImageBatch]:
        planned: collections.deque[Future[_Planned | None]] = collections.deque()
        ready: collections.deque[Future[ImageBatch | None]] = collections.deque()
        while True:
            while len(ready) <= self._config.prefetch_batches:
                while len(planned) <= _READ_AHEAD:
                    planned.append(self._plan_pool.submit(self._plan_next))
                ready.append(self._batch_pool.submit(self._build, planned.popleft()))
            started = time.perf_counter()
            batch = ready.popleft().result()
            self._pipeline.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _plan_next(self) -> _Planned | None:
        """Take the next share and request its row groups: its own first, then the open ones."""
        share = next(self._shares, None)
        if share is None:
            return None
        fetched: dict[int, Future[RowGroup]] = {}
        for group in itertools.chain(np.unique(share.row_group).tolist(), share.open_groups.tolist()):
            if group not in fetched:
                future = self._groups.get(group)
                if future is None:
                    future = self._groups[group] = self._io_pool.submit(self._pipeline._reader.read, group)
                fetched[group] = future
        return share, fetched

    def _build(self, planned: Future[_Planned | None]) -> ImageBatch | None:
        share_and_groups = planned.result()
        if share_and_groups is None:
            return None
        share, groups = share_and_groups
        encoded, ids, masks = _rows_of(share, groups)
        padding = share.size - len(ids)
        wanted = self._pipeline._wanted
        if wanted is not None:
            encoded = [data if name in wanted else None for data, name in zip(encoded, ids, strict=True)]
        encoded += [None] * padding
        images, content_hw, source_hw, valid = self._pipeline.decode(
            encoded, decode_size=self._config.decode_size, pool=self._decode_pool
        )
        positions = np.concatenate([share.positions, np.full(padding, -1, dtype=np.int64)])
        regions, num_regions = None, 0
        if self._pipeline._regions is not None:
            canvas_hw = (images.shape[2], images.shape[3])
            regions, num_regions = decode_regions_batch(
                [*masks, *[None] * padding],
                content_hw=content_hw,
                canvas_hw=canvas_hw,
                pool=self._decode_pool,
                pinned=torch.cuda.is_available(),
            )
        return ImageBatch(
            images=images,
            content_hw=content_hw,
            source_hw=source_hw,
            image_ids=(*ids, *[""] * padding),
            positions=torch.from_numpy(positions),
            valid=valid,
            epoch=share.epoch,
            regions=regions,
            num_regions=num_regions,
        )


def _rows_of(
    share: Share, groups: dict[int, Future[RowGroup]]
) -> tuple[list[np.ndarray | None], Sequence[str], list[bytes | None]]:
    """Encoded images, ids and, where a column of regions is read, encoded masks."""
    encoded, ids, masks = [], [], []
    for group, row in zip(share.row_group.tolist(), share.row_in_group.tolist(), strict=True):
        row_group = groups[group].result()
        encoded.append(row_group.encoded(row))
        ids.append(row_group.image_ids[row])
        if row_group.regions is not None:
            masks.append(row_group.regions[row])
    return encoded, ids, masks
