"""`BuildConfig`, `place_rows` and `write_shard`: which images a shard gets, and its bytes, the same on every machine."""

import collections
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveInt

from workloads.config import config, to_dict
from workloads.data.build.region_masks import RegionColumnsConfig
from workloads.data.build.rows import BuiltRow, ImageStatistics, Reject, RowBuilder, stored_schema
from workloads.data.build.sources import SourceConfig
from workloads.data.store.image_file import MAX_PIXELS

T = TypeVar("T")
R = TypeVar("R")

REJECTS_SCHEMA = pa.schema([("path", pa.string()), ("image_id", pa.string()), ("reason", pa.string())])


@config
class BuildConfig:
    """The source, output and settings of a build."""

    source: SourceConfig
    output: str
    """Folder (path or URI) to write the dataset to."""
    seed: NonNegativeInt = 0
    """Seed of the order: with each image's path in the source it decides the shard and position of its row."""
    rows_per_shard: PositiveInt = 4096
    """Images listed for one shard; rejects make it smaller."""
    row_group_bytes: PositiveInt = 1 << 20
    """Bytes of encoded images after which a row group is closed: the unit of reading, shuffling and resuming."""
    short_side: PositiveInt | None = None
    """Shrink images to this shorter side, pixels, and encode them as JPEG; none: their bytes are stored unchanged."""
    quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality where images are encoded again, 1 to 100."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images of more pixels are rejected."""
    val_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images, by a hash of their ids, that goes to a dataset `val` beside `train`, both under `output`."""
    regions: RegionColumnsConfig = RegionColumnsConfig()
    """Columns of region masks beside the images, for objectives that contrast regions."""
    overwrite: bool = False
    """Whether another dataset at `output` may be replaced."""

    def describe(self) -> dict[str, Any]:
        """The settings that decide the dataset's bytes, without paths, for the manifest."""
        names = ("seed", "rows_per_shard", "row_group_bytes", "short_side", "quality", "max_pixels", "val_share")
        described = {name: getattr(self, name) for name in names}
        if self.regions.columns:
            regions = {name: block for name, block in to_dict(self.regions).items() if block is not None}
            regions.get("panoptic", {}).pop("masks", None)
            described["regions"] = regions
        return described


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """The figures of one written shard; those for the manifest are a pure function of the inputs."""

    size: int
    sha256: str
    row_groups: tuple[tuple[int, int, int], ...]  # (offset, length, rows)
    paths: tuple[str, ...]  # of the rows written
    digests: tuple[bytes, ...]  # SHA-256 of each row's source bytes
    rejects: tuple[tuple[str, str, str], ...]  # (path, image_id, reason)
    statistics: ImageStatistics

    @property
    def rows(self) -> int:
        """Number of rows written."""
        return len(self.paths)

    def to_json(self) -> str:
        """The result as JSON, for `from_json`."""
        return json.dumps({**asdict(self), "digests": [digest.hex() for digest in self.digests]})

    @classmethod
    def from_json(cls, text: str | bytes) -> "ShardResult":
        """Read a result that `to_json` wrote."""
        data = json.loads(text)
        return cls(
            size=data["size"],
            sha256=data["sha256"],
            row_groups=tuple(tuple(group) for group in data["row_groups"]),
            paths=tuple(data["paths"]),
            digests=tuple(bytes.fromhex(digest) for digest in data["digests"]),
            rejects=tuple(tuple(reject) for reject in data["rejects"]),
            statistics=ImageStatistics(**data["statistics"]),
        )


def split_rows(listing: pa.Table, *, val_share: float) -> dict[str, pa.Table]:
    """Split a listing into `train` and `val` by a hash of each image id; without a share, all of it is under ""."""
    if not val_share:
        return {"": listing}
    keys = np.array([_hash64(f"split:{image_id}") for image_id in listing["image_id"].to_pylist()], dtype=np.uint64)
    is_val = keys < np.uint64(val_share * 2**64)
    return {"train": listing.filter(pa.array(~is_val)), "val": listing.filter(pa.array(is_val))}


def without_repeated_ids(listing: pa.Table) -> tuple[pa.Table, tuple[tuple[str, str, str], ...]]:
    """The listing with only the first row of each image id, and the other rows as rejects (path, image_id, reason)."""
    ids = listing["image_id"].to_pylist()
    if len(set(ids)) == len(ids):
        return listing, ()
    places: dict[str, int] = {}
    first = np.array([places.setdefault(image_id, place) == place for place, image_id in enumerate(ids)])
    repeated = listing.filter(pa.array(~first))
    pairs = zip(repeated["path"].to_pylist(), repeated["image_id"].to_pylist(), strict=True)
    return listing.filter(pa.array(first)), tuple((path, image_id, "image id repeated") for path, image_id in pairs)


def place_rows(listing: pa.Table, *, seed: int, rows_per_shard: int) -> list[pa.Table]:
    """Distribute a listing over shards by a hash of (seed, path), independently of the order of the listing."""
    paths = listing["path"].to_pylist()
    keys = np.array([_hash64(f"{seed}:{path}") for path in paths], dtype=np.uint64)
    order = np.argsort(keys, kind="stable")
    return [listing.take(order[start : start + rows_per_shard]) for start in range(0, len(order), rows_per_shard)]


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def write_shard(
    rows: pa.Table,
    sink: BinaryIO,
    *,
    read: Callable[[str], bytes],
    build: BuildConfig,
    read_regions: Callable[[str], bytes] | None = None,
    excluded: frozenset[str] = frozenset(),
    threads: int = 1,
    tick: Callable[[int], None] = lambda images: None,
) -> ShardResult:
    """Write one shard of `rows` (`LISTING_SCHEMA`, in this order) to `sink`.

    Args:
        read: reads the bytes of a location.
        read_regions: reads the bytes of the source's column of masks at a location.
        excluded: paths with the same bytes as an image elsewhere.
        threads: number of images that are prepared at the same time.
        tick: called with the number of images that are done since the last call.

    Raises:
        OSError: the sink cannot be written to. A fault of an image is a reject, not an error.
    """
    hashing = _HashingSink(sink)
    written = _Written()
    metadata: list[pq.FileMetaData] = []
    prepare = _preparing(build, read, read_regions, excluded)
    listed = (row for batch in rows.to_batches(max_chunksize=256) for row in batch.to_pylist())
    with (
        ThreadPoolExecutor(threads) as pool,
        pq.ParquetWriter(
            pa.PythonFile(hashing, mode="w"),
            stored_schema(build.regions.columns),
            compression="NONE",
            use_dictionary=["label"],
            write_statistics=False,
            write_page_checksum=True,
            data_page_size=2 * build.row_group_bytes,
            metadata_collector=metadata,
        ) as writer,
    ):
        prepared = _map_ahead(pool, prepare, listed, 4 * threads)
        for group in _row_groups(rows, prepared, build, written, tick):
            writer.write_table(group, row_group_size=len(group))
            hashing.check()
    hashing.check()
    return ShardResult(
        size=hashing.size,
        sha256=hashing.sha256.hexdigest(),
        row_groups=tuple(_extents(metadata[0])),
        paths=tuple(written.paths),
        digests=tuple(written.digests),
        rejects=tuple(written.rejects),
        statistics=written.statistics,
    )


def _preparing(
    build: BuildConfig,
    read: Callable[[str], bytes],
    read_regions: Callable[[str], bytes] | None,
    excluded: frozenset[str],
) -> Callable[[dict[str, Any]], BuiltRow | Reject]:
    """The function that turns a listed row into a row of the shard, or a reject."""
    build_row = RowBuilder(
        read=read,
        read_regions=read_regions,
        excluded=excluded,
        short_side=build.short_side,
        quality=build.quality,
        max_pixels=build.max_pixels,
        regions=build.regions,
    )

    def prepare(row: dict[str, Any]) -> BuiltRow | Reject:
        try:
            return build_row(row)
        except Reject as reject:
            return reject

    return prepare


def _map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`pool.map` that is at most `ahead` results ahead: a shard's images need not fit in memory."""
    waiting: collections.deque[Future[R]] = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(slots=True)
class _Written:
    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    statistics: ImageStatistics = field(default_factory=ImageStatistics)


def _row_groups(
    rows: pa.Table,
    prepared: Iterator[BuiltRow | Reject],
    build: BuildConfig,
    written: _Written,
    tick: Callable[[int], None],
) -> Iterator[pa.Table]:
    schema = stored_schema(build.regions.columns)
    group: list[dict[str, Any]] = []
    size = 0
    ids = zip(rows["path"].to_pylist(), rows["image_id"].to_pylist(), strict=True)
    for (path, image_id), item in zip(ids, prepared, strict=True):
        tick(1)
        if isinstance(item, Reject):
            written.rejects.append((path, image_id, str(item)))
            continue
        written.paths.append(path)
        written.digests.append(item.digest)
        written.statistics.add(item.statistics)
        group.append(item.row)
        size += item.size
        if size >= build.row_group_bytes:
            yield pa.Table.from_pylist(group, schema=schema)
            group, size = [], 0
    if group:
        yield pa.Table.from_pylist(group, schema=schema)


def _extents(metadata: pq.FileMetaData) -> Iterator[tuple[int, int, int]]:
    """(offset, length, rows) of each row group; its column chunks follow one another without a gap."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        starts = [
            column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            for column in columns
        ]
        ends = [start + c.total_compressed_size for start, c in zip(starts, columns, strict=True)]
        yield min(starts), max(ends) - min(starts), group.num_rows


class _HashingSink(io.RawIOBase):
    """Counts and hashes the bytes on their way to `sink`.

    An error of `sink` is stored for `check` to raise, and the bytes after it are dropped: pyarrow cannot close a writer
    whose file has failed, and would raise an error about its footer instead.
    """

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self._error: OSError | None = None
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        if self._error is None:
            try:
                self._sink.write(data)
            except OSError as error:
                self._error = error
        self.size += len(memoryview(data).cast("B"))
        return len(memoryview(data).cast("B"))

    def tell(self) -> int:
        return self.size

    def check(self) -> None:
        """Raise the error of the first write that failed, if one did."""
        if self._error is not None:
            raise self._error
