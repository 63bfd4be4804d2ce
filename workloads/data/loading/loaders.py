"""Row groups in, batches out: reading, decoding and prefetching on threads, in the sample plan's order."""

import collections
import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from workloads.config import ConfigError, config
from workloads.data.loading.decode import decode_batch, decode_regions_batch
from workloads.data.loading.decode_cuda import cuda_device, decode_batch_on, nvjpeg
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.store.disk_cache import DiskCache
from workloads.data.store.manifest import DataError, Dataset
from workloads.data.store.row_groups import RowGroup, RowGroupReader, damaged_shard
from workloads.types import ImageBatch

_READ_AHEAD = 4

_log = logging.getLogger(__name__)


@config
class DataConfig:
    """Which dataset is read, and how."""

    uri: str
    """Folder or s3:// URI of a dataset made by `orchestrator data build`."""
    decode_size: PositiveInt | None = 256
    """Longer side, pixels, to which images are shrunk while decoding; none: source resolution."""
    dct_scaling: bool = False
    """Decode JPEGs of at least twice decode_size at 1/2, 1/4 or 1/8 of their size: quicker, slightly other pixels."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """What decodes JPEGs; cuda: the worker's own GPU, by nvJPEG, with pixels that differ slightly from the CPU's."""
    lanes: PositiveInt | None = None
    """Parallel streams of the sample plan; divides the global batch size; none: its largest divisor not above 64."""
    io_threads: PositiveInt = 8
    """Threads that fetch row groups."""
    decode_threads: PositiveInt = 2
    """Threads that decode images."""
    prefetch_batches: NonNegativeInt = 3
    """Batches made ready ahead of the one in use."""
    cache_dir: str | None = None
    """Local folder that keeps row groups for later epochs, shared by the workers of a node; none: no cache."""
    cache_gib: PositiveFloat = 50.0
    """Size, GiB, at which the cache drops what was unused longest."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of an epoch's rows that may fail to decode before the run fails."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """What a dataset says of one image beside its pixels."""

    label: str | None
    size_hw: tuple[int, int]  # pixels, upright
    boxes_xyxy: np.ndarray  # float32 (n, 4), pixels of the upright source image
    categories: tuple[str, ...]
    crowd: np.ndarray  # bool (n,): COCO's flag
    difficult: np.ndarray  # bool (n,): VOC's flag


@dataclass(frozen=True, slots=True)
class _Share:
    """One rank's rows of one batch."""

    epoch: int
    positions: np.ndarray
    row_group: np.ndarray
    row_in_group: np.ndarray
    open_groups: np.ndarray  # what later batches need soon, this one's groups included
    size: int  # rows of the batch; the missing ones are padding


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
        self._pipeline = _Pipeline(dataset, config, regions=regions)
        self.plan, self._rank, self._world_size = plan, rank, world_size
        self._max_bad_share = config.max_bad_share
        lanes = plan.lanes_of(rank, world_size)
        self._rows_per_epoch = plan.steps_per_epoch * plan.global_batch_size // plan.lanes * len(lanes)
        self.bad_rows = 0
        """Rows that did not decode, since this loader was made."""

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
                    _log.warning("epoch %d: rows that do not decode are left out: %s", epoch, ", ".join(undecodable))
                bad += undecodable
                self.bad_rows += len(undecodable)
                if len(bad) > self._max_bad_share * self._rows_per_epoch:
                    raise DataError(
                        f"{len(bad)} rows of epoch {epoch} do not decode, more than data.max_bad_share="
                        f"{self._max_bad_share} allows: {', '.join(bad[:5])}; run `orchestrator data verify`"
                    )
                yield batch

    def _shares(self, start_step: int) -> Iterator[_Share]:
        for step in itertools.count(start_step):
            epoch, batch = divmod(step, self.plan.steps_per_epoch)
            where = (epoch, batch, self._rank, self._world_size)
            positions, row_group, row_in_group = self.plan.share(*where)
            yield _Share(
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
        wanted: ids of the images that are decoded; the others are there as rows that are not valid. None: all.
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
        self._pipeline = _Pipeline(dataset, config, wanted=wanted)
        self.num_images = min(dataset.num_images, limit if limit is not None else dataset.num_images)
        """Images over all ranks."""
        per_rank = -(-self.num_images // world_size)
        self._rows = range(min(rank * per_rank, self.num_images), min((rank + 1) * per_rank, self.num_images))
        self._batch_size = batch_size
        self._num_batches = -(-per_rank // batch_size)
        self._annotations: dict[str, Annotations] | None = None

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[ImageBatch]:
        with self._pipeline.run(self._shares()) as batches:
            yield from batches

    def annotations(self, image_id: str) -> Annotations:
        """Label and objects of one image; the first call reads those of the whole dataset.

        Raises:
            KeyError: no such image.
        """
        if self._annotations is None:
            self._annotations = read_annotations(self._dataset)
        return self._annotations[image_id]

    def _shares(self) -> Iterator[_Share]:
        ends = np.cumsum(self._dataset.row_groups.rows, dtype=np.int64)
        for batch in range(self._num_batches):
            first = self._rows.start + batch * self._batch_size
            positions = np.arange(first, min(first + self._batch_size, self._rows.stop), dtype=np.int64)
            groups = np.searchsorted(ends, positions, side="right")
            in_group = positions - ends[groups] + self._dataset.row_groups.rows[groups]
            yield _Share(
                epoch=0,
                positions=positions,
                row_group=groups,
                row_in_group=in_group,
                open_groups=np.unique(groups),
                size=self._batch_size,
            )


def read_annotations(dataset: Dataset) -> dict[str, Annotations]:
    """Labels and objects of every image, by image id.

    Raises:
        DataError: a shard cannot be read.
    """
    found: dict[str, Annotations] = {}
    columns = ["image_id", "width", "height", "label", "objects"]
    for shard in range(len(dataset.manifest.shards)):
        try:
            table = pq.read_table(dataset.shard_path(shard), filesystem=dataset.filesystem, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise damaged_shard(dataset, shard, error) from None
        for row in table.to_pylist():
            objects = row["objects"] or []
            xywh = np.array([item["bbox"] for item in objects], dtype=np.float32).reshape(-1, 4)
            found[row["image_id"]] = Annotations(
                label=row["label"],
                size_hw=(row["height"], row["width"]),
                boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
                categories=tuple(item["category"] for item in objects),
                crowd=np.array([item["crowd"] for item in objects], dtype=bool),
                difficult=np.array([bool(item.get("difficult")) for item in objects], dtype=bool),
            )
    return found


class _Pipeline:
    """Turns shares into batches, in order, some of them ahead of the consumer.

    One thread walks the plan and asks for row groups early; they live as long as a batch on its way has them open.
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
        self.decode = _decoder(config)
        self.wait_seconds = 0.0

    def run(self, shares: Iterator[_Share]) -> "_Run":
        return _Run(self, shares)


def _decoder(config: DataConfig) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    if config.decode_device == "cpu":
        return functools.partial(decode_batch, pinned=torch.cuda.is_available(), dct_scaling=config.dct_scaling)
    if config.dct_scaling:
        raise ConfigError(
            "data.dct_scaling: only the CPU's decoder has it; leave it out, or set data.decode_device=cpu"
        )
    device = cuda_device()
    return functools.partial(decode_batch_on, device, decode_jpegs=nvjpeg(device))


class _Run:
    """One pass of a pipeline: a context manager that owns the threads and yields the batches."""

    def __init__(self, pipeline: _Pipeline, shares: Iterator[_Share]) -> None:
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
        planned: collections.deque[Future[Any]] = collections.deque()
        ready: collections.deque[Future[ImageBatch | None]] = collections.deque()
        while True:
            while len(ready) <= self._config.prefetch_batches:
                while len(planned) <= _READ_AHEAD:
                    planned.append(self._plan_pool.submit(self._ask))
                ready.append(self._batch_pool.submit(self._make, planned.popleft()))
            started = time.perf_counter()
            batch = ready.popleft().result()
            self._pipeline.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _ask(self) -> tuple[_Share, dict[int, Future[RowGroup]]] | None:
        """Take the next share and see that its row groups are on their way; its own first, then the open ones."""
        share = next(self._shares, None)
        if share is None:
            return None
        held: dict[int, Future[RowGroup]] = {}
        for group in itertools.chain(np.unique(share.row_group).tolist(), share.open_groups.tolist()):
            if group not in held:
                future = self._groups.get(group)
                if future is None:
                    future = self._groups[group] = self._io_pool.submit(self._pipeline._reader.read, group)
                held[group] = future
        return share, held

    def _make(self, planned: "Future[tuple[_Share, dict[int, Future[RowGroup]]] | None]") -> ImageBatch | None:
        asked = planned.result()
        if asked is None:
            return None
        share, held = asked
        encoded, ids, masks = _rows_of(share, held)
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
    share: _Share, held: dict[int, Future[RowGroup]]
) -> tuple[list[np.ndarray | None], Sequence[str], list[bytes | None]]:
    """Encoded images, ids and, where they were asked for, encoded masks."""
    encoded, ids, masks = [], [], []
    for group, row in zip(share.row_group.tolist(), share.row_in_group.tolist(), strict=True):
        row_group = held[group].result()
        encoded.append(row_group.encoded(row))
        ids.append(row_group.image_ids[row])
        if row_group.regions is not None:
            masks.append(row_group.regions[row])
    return encoded, ids, masks
