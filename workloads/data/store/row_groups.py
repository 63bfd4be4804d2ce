"""`RowGroupReader`: ranged reads of single row groups, through the disk cache if there is one, checked before use."""

import collections
import threading
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from workloads.data.store.disk_cache import DiskCache
from workloads.data.store.manifest import Dataset
from workloads.data.store.region_codec import PREFIX
from workloads.errors import DataError, StoreUnavailableError
from workloads.storage.filesystems import ATTEMPTS, is_outage, with_retries

_OPEN_SHARDS = 256
_COLUMNS = ["image.bytes", "image_id"]


def damaged_shard(dataset: Dataset, shard: int, error: Exception) -> DataError:
    """The error for a shard that cannot be read or does not match the manifest."""
    name = dataset.manifest.shards[shard].name
    reason = " ".join(str(error).split())[:300]
    return DataError(
        f"{dataset.uri}/{name}: cannot be read ({reason}); restore it, or find the damage with `orchestrator data verify`"
    )


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Encoded images of one row group, and their ids."""

    data: np.ndarray  # uint8, all images one after the other
    offsets: np.ndarray  # int64 (rows + 1,)
    image_ids: list[str]
    regions: list[bytes | None] | None = None  # encoded masks, where a column of them is read

    def encoded(self, row: int) -> np.ndarray | None:
        """One image's bytes, uint8 (n,), or None where the row has none."""
        start, stop = self.offsets[row], self.offsets[row + 1]
        return self.data[start:stop] if stop > start else None


class RowGroupReader:
    """Fetches row groups by their number in the dataset; safe for many threads.

    The most recently used shards stay open; a file that leaves them is closed when its last reader drops it.
    """

    def __init__(self, dataset: Dataset, cache: DiskCache | None = None, *, regions: str | None = None) -> None:
        self._dataset = dataset
        self._regions = None if regions is None else PREFIX + regions
        self._columns = _COLUMNS if regions is None else [*_COLUMNS, f"{self._regions}.bytes"]
        self._cache = cache
        self._attempts = ATTEMPTS if isinstance(dataset.filesystem, pafs.S3FileSystem) else 1
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, tuple[pa.NativeFile, pq.FileMetaData]] = collections.OrderedDict()

    def read(self, group: int) -> RowGroup:
        """Read one row group.

        Raises:
            DataError: it cannot be read after all retries, or fails its length, row count or checksums.
        """
        shard = int(self._dataset.row_groups.shard[group])
        try:
            name = f"{self._dataset.manifest.sha256[:16]}-{group}"
            data = self._cache.get(name) if self._cache is not None else None
            if data is not None:
                return self._parse(group, data)
            data, parsed = with_retries(lambda: self._fetch(group), attempts=self._attempts)
        except (
            OSError,
            pa.ArrowException,
            KeyError,
            ValueError,
        ) as error:  # a footer that is damaged has other columns
            if is_outage(error):
                raise StoreUnavailableError(str(damaged_shard(self._dataset, shard, error))) from None
            raise damaged_shard(self._dataset, shard, error) from None
        if self._cache is not None:
            self._cache.put(name, data)
        return parsed

    def _fetch(self, group: int) -> tuple[bytes, RowGroup]:
        index = self._dataset.row_groups
        file, _ = self._shard(int(index.shard[group]))
        length = int(index.length[group])
        data = file.read_at(length, int(index.offset[group]))
        if len(data) != length:
            raise OSError(f"row group {group} has {len(data)} of {length} bytes")
        # Parsed here, because a page that fails its checksum may have been damaged on the way: worth another try.
        return data, self._parse(group, data)

    def _parse(self, group: int, data: bytes) -> RowGroup:
        index = self._dataset.row_groups
        shard, rows = int(index.shard[group]), int(index.rows[group])
        _, metadata = self._shard(shard)
        extent = pa.PythonFile(_Extent(data, int(index.offset[group])), mode="r")
        parquet = pq.ParquetFile(extent, metadata=metadata, page_checksum_verification=True)
        table = parquet.read_row_group(group - int(index.first[shard]), columns=self._columns, use_threads=False)
        if len(table) != rows:
            raise OSError(f"row group {group} has {len(table)} rows where the index says {rows}")
        return _as_row_group(table, self._regions)

    def _shard(self, shard: int) -> tuple[pa.NativeFile, pq.FileMetaData]:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        file = self._dataset.filesystem.open_input_file(self._dataset.shard_path(shard))
        if file.size() != self._dataset.manifest.shards[shard].size:
            expected = self._dataset.manifest.shards[shard].size
            raise damaged_shard(self._dataset, shard, ValueError(f"{file.size()} bytes, the manifest says {expected}"))
        opened = (file, pq.read_metadata(file))
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened


def region_columns(dataset: Dataset) -> list[str]:
    """Names of the columns of regions that the dataset has, without their prefix.

    Raises:
        DataError: a shard cannot be read.
    """
    try:
        schema = pq.read_schema(dataset.shard_path(0), filesystem=dataset.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise damaged_shard(dataset, 0, error) from None
    return [column.removeprefix(PREFIX) for column in schema.names if column.startswith(PREFIX)]


def check_regions(dataset: Dataset, name: str) -> None:
    """Check that the dataset has a column of regions of this name.

    Raises:
        DataError: it does not; the message names the columns that it has.
    """
    known = region_columns(dataset)
    if name not in known:
        has = f"only {', '.join(known)}" if known else "none"
        raise DataError(f"{dataset.uri}: has no regions {name!r}, {has}; build it with `data build --regions {name}`")


def _as_row_group(table: pa.Table, regions: str | None) -> RowGroup:
    column = table["image"]
    # combine_chunks copies even a single chunk, and a row group of this project's builds is one.
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    images = chunk.field("bytes").cast(pa.large_binary())
    _, offsets, data = images.buffers()
    used = np.frombuffer(offsets, dtype=np.int64)[images.offset : images.offset + len(images) + 1]
    encoded = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, dtype=np.uint8)
    masks = None
    if regions is not None:
        masks = [mask and mask["bytes"] for mask in table[regions].to_pylist()]
    return RowGroup(data=encoded, offsets=used, image_ids=table["image_id"].to_pylist(), regions=masks)


class _Extent:
    """A file of which only one extent exists: the pages of a row group, which is all that pyarrow reads."""

    closed = False

    def __init__(self, data: bytes, offset: int) -> None:
        self._data, self._offset, self._position = memoryview(data), offset, 0

    def read(self, size: int = -1) -> memoryview:
        start = self._position - self._offset
        if start < 0:
            raise OSError(f"a page lies before its row group, at byte {self._position}")
        part = self._data[start : start + size if size >= 0 else None]
        self._position += len(part)
        return part

    def seek(self, position: int, whence: int = 0) -> int:
        base = (0, self._position, self._offset + len(self._data))[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
