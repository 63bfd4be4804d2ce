"""`Manifest`, `RowGroups` and `Dataset`: a dataset's shards, the index of their row groups, and the hash that identifies it."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from workloads.errors import DataError
from workloads.storage.filesystems import read_bytes, resolve_uri

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
ROW_GROUPS_NAME = "row_groups.parquet"
REJECTS_NAME = "rejects.parquet"
ROW_GROUPS_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int64()), ("rows", pa.int32())]
)
_HOW_TO_BUILD = "build the dataset with `orchestrator data build`"

__all__ = ["DataError", "Dataset", "FileEntry", "Manifest", "RowGroups", "open_dataset", "resolve_uri"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a dataset: its name beside the manifest, size in bytes, SHA-256 (hex) and number of rows."""

    name: str
    size: int
    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset's contents. Holds no absolute path and no time, so that a rebuild has the same hash."""

    shards: tuple[FileEntry, ...]
    row_groups: FileEntry
    rejects: FileEntry
    build: Mapping[str, Any]  # the build's configuration without its paths
    source: Mapping[str, Any]  # kind, how many images were listed, category ids
    num_images: int
    num_bytes: int  # of encoded images
    statistics: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @functools.cached_property
    def sha256(self) -> str:
        """The dataset's identity: SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, an indentation of one space, a newline at the end."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str) -> "Manifest":
        """Read a manifest; errors call it `name`.

        Raises:
            DataError: not a manifest, or one of another schema version.
        """
        try:
            data = json.loads(text)
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{name}: has schema version {version}, this program reads {SCHEMA_VERSION}; build again"
                )
            data["shards"] = tuple(FileEntry(**shard) for shard in data["shards"])
            for key in ("row_groups", "rejects"):
                data[key] = FileEntry(**data[key])
            return cls(**data)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name}: is not a dataset manifest ({error!r}); {_HOW_TO_BUILD}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroups:
    """The place of every row group: arrays of one length, ordered by shard and by offset within it."""

    shard: np.ndarray  # int32: index into `manifest.shards`
    offset: np.ndarray  # int64: bytes from the start of the shard
    length: np.ndarray  # int64: bytes
    rows: np.ndarray  # int32
    first: np.ndarray  # int64 (shards + 1,): where each shard's row groups begin

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def from_parquet(cls, data: bytes, *, num_shards: int) -> "RowGroups":
        """Read the index from the bytes of `row_groups.parquet`."""
        # Column by column: of a billion images the whole table beside its arrays would double the memory.
        columns = {name: _column(data, name) for name in ROW_GROUPS_SCHEMA.names}
        first = np.searchsorted(columns["shard"], np.arange(num_shards + 1, dtype=np.int32)).astype(np.int64)
        return cls(first=first, **columns)

    def to_table(self) -> pa.Table:
        """The index as the table of `row_groups.parquet`."""
        return pa.table([self.shard, self.offset, self.length, self.rows], schema=ROW_GROUPS_SCHEMA)


def _column(data: bytes, name: str) -> np.ndarray:
    column = pq.read_table(pa.BufferReader(data), columns=[name], use_threads=False)[name].to_numpy()
    pa.default_memory_pool().release_unused()
    return column


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """An opened dataset: its manifest, its row-group index, and the file system that holds the shards."""

    uri: str
    filesystem: pafs.FileSystem
    root: str  # path of the dataset inside `filesystem`
    manifest: Manifest
    row_groups: RowGroups

    @property
    def num_images(self) -> int:
        """Number of images, undecodable ones included."""
        return self.manifest.num_images

    def shard_path(self, shard: int) -> str:
        """Path of shard number `shard` inside the file system."""
        return f"{self.root}/{self.manifest.shards[shard].name}"


def open_dataset(uri: str) -> Dataset:
    """Open the dataset at a local folder or a URI and check that its files are the listed ones, by size.

    Raises:
        DataError: no manifest there; a shard is missing or of another size; the row-group index does not match.
    """
    filesystem, root = resolve_uri(uri)
    try:
        # Few attempts: before anything was read, a wrong address is likelier than an outage.
        text = read_bytes(filesystem, f"{root}/{MANIFEST_NAME}", attempts=3)
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(filesystem, pafs.S3FileSystem) and not _exists(filesystem, root.partition("/")[0]):
            raise DataError(f"{uri}: the bucket does not exist; correct data.uri or AWS_ENDPOINT_URL") from None
        if parts := _datasets_below(filesystem, root):
            named = " or ".join(f"{uri.rstrip('/')}/{part}" for part in parts)
            many = "two datasets" if len(parts) == 2 else f"{len(parts)} datasets" if len(parts) > 1 else "a dataset"
            raise DataError(f"{uri}: holds no {MANIFEST_NAME}, but {many}: name {named}") from None
        raise DataError(f"{uri}: holds no {MANIFEST_NAME}; {_HOW_TO_BUILD}, or name another folder") from None
    except OSError as error:
        raise DataError(
            f"{uri}: {MANIFEST_NAME} cannot be read ({error}); check AWS_ENDPOINT_URL and credentials"
        ) from None
    manifest = Manifest.from_json(text, name=f"{uri}/{MANIFEST_NAME}")
    _check_sizes(uri, filesystem, root, manifest)
    row_groups = _read_row_groups(uri, filesystem, root, manifest)
    return Dataset(uri=uri, filesystem=filesystem, root=root, manifest=manifest, row_groups=row_groups)


def _datasets_below(filesystem: pafs.FileSystem, root: str) -> list[str]:
    """Names of the folders in `root` that are datasets, as a build with `val_share` leaves them; a few at most."""
    try:
        folders = [
            info.base_name
            for info in filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
            if info.type == pafs.FileType.Directory
        ]
    except OSError:
        return []
    folders = sorted(folders, key=lambda name: (name not in ("train", "val"), name))[:8]
    return [name for name in folders if _exists(filesystem, f"{root}/{name}/{MANIFEST_NAME}")]


def _exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def _check_sizes(uri: str, filesystem: pafs.FileSystem, root: str, manifest: Manifest) -> None:
    # One listing, because a request per shard takes minutes on an object store.
    found = {info.base_name: info.size for info in filesystem.get_file_info(pafs.FileSelector(root))}
    for shard in manifest.shards:
        size = found.get(shard.name)
        if size is None:
            raise DataError(f"{uri}/{shard.name}: is missing though the manifest lists it; restore it or build again")
        if size != shard.size:
            raise DataError(
                f"{uri}/{shard.name}: has {size} bytes, the manifest says {shard.size}; restore it or build again"
            )


def _read_row_groups(uri: str, filesystem: pafs.FileSystem, root: str, manifest: Manifest) -> RowGroups:
    entry = manifest.row_groups
    name = f"{uri}/{entry.name}"
    try:
        data = read_bytes(filesystem, f"{root}/{entry.name}")
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error}); restore it or build again") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(f"{name}: does not match the manifest's SHA-256; restore it or build again")
    row_groups = RowGroups.from_parquet(data, num_shards=len(manifest.shards))
    if int(row_groups.rows.sum(dtype=np.int64)) != manifest.num_images:
        raise DataError(f"{name}: does not add up to the manifest's {manifest.num_images} images; build again")
    return row_groups
