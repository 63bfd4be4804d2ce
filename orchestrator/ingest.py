"""Building a dataset: list, place, write shards side by side, drop duplicates, and commit the manifest last."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import cpu_count
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from workloads.data.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    ROW_GROUPS_NAME,
    DataError,
    FileEntry,
    Manifest,
    RowGroups,
    read_bytes,
    resolve_uri,
)
from workloads.data.shards import REJECTS_SCHEMA, BuildConfig, ShardResult, place_rows, write_shard
from workloads.data.sources import list_source, source_filesystem

Progress = Callable[[int, int], None]


def build_dataset(build: BuildConfig, *, progress: Progress | None = None) -> Manifest:
    """Convert a source to sharded Parquet; `progress` is told (images done, images in all).

    Run again after a kill it ends with the same manifest. A bad image never fails the build: it goes to the rejects
    table with the reason.

    Raises:
        DataError: the source cannot be listed, nothing in it is an image, or the output cannot be written.
    """
    listing, about = list_source(build.source)
    filesystem, root = resolve_uri(build.output)
    filesystem.create_dir(root, recursive=True)
    # No reader may see old and new shards under one manifest.
    with suppress(FileNotFoundError):
        filesystem.delete_file(f"{root}/{MANIFEST_NAME}")
    shards = place_rows(listing, seed=build.seed, rows_per_shard=build.rows_per_shard)
    results = _write_shards(build, shards, filesystem, root, progress)
    _rewrite_without_duplicates(build, shards, results, filesystem, root)
    if not sum(result.rows for result in results):
        raise DataError(f"{build.output}: none of the {len(listing)} files listed is an image; see {REJECTS_NAME}")
    manifest = _assemble(build, about, results, filesystem, root)
    with _atomically(filesystem, f"{root}/{MANIFEST_NAME}") as sink:
        sink.write(manifest.to_json().encode())
    return manifest


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.parquet"


def _write_shards(
    build: BuildConfig,
    shards: list[pa.Table],
    filesystem: pafs.FileSystem,
    root: str,
    progress: Progress | None,
) -> list[ShardResult]:
    total, done, results = sum(len(rows) for rows in shards), 0, []
    for index, rows in enumerate(shards):
        results.append(_write_one(build, index, rows, filesystem, root, frozenset()))
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return results


def _write_one(
    build: BuildConfig,
    index: int,
    rows: pa.Table,
    filesystem: pafs.FileSystem,
    root: str,
    excluded: frozenset[str],
) -> ShardResult:
    source = source_filesystem(build.source)
    with _atomically(filesystem, f"{root}/{shard_name(index)}") as sink:
        return write_shard(
            rows,
            sink,
            read=lambda location: read_bytes(source, location),
            build=build,
            excluded=excluded,
            threads=cpu_count() or 1,
        )


def _rewrite_without_duplicates(
    build: BuildConfig, shards: list[pa.Table], results: list[ShardResult], filesystem: pafs.FileSystem, root: str
) -> None:
    """Write the shards that hold a copy of another image once more, without it; the copy of the first path stays."""
    copies = defaultdict(list)
    for result in results:
        for path, digest in zip(result.paths, result.digests, strict=True):
            copies[digest].append(path)
    excluded = frozenset(path for paths in copies.values() for path in sorted(paths)[1:])
    for index, result in enumerate(results):
        if not excluded.isdisjoint(result.paths):
            results[index] = _write_one(build, index, shards[index], filesystem, root, excluded)


def _assemble(
    build: BuildConfig,
    about: dict[str, object],
    results: list[ShardResult],
    filesystem: pafs.FileSystem,
    root: str,
) -> Manifest:
    kept = [(index, result) for index, result in enumerate(results) if result.rows]
    groups = np.array(
        [(number, *group) for number, (_, result) in enumerate(kept) for group in result.row_groups], dtype=np.int64
    ).reshape(-1, 4)
    first = np.searchsorted(groups[:, 0], np.arange(len(kept) + 1))
    row_groups = RowGroups(
        shard=groups[:, 0].astype(np.int32),
        offset=groups[:, 1],
        length=groups[:, 2],
        rows=groups[:, 3].astype(np.int32),
        first=first,
    )
    rejects = sorted(reject for result in results for reject in result.rejects)
    columns = list(zip(*rejects, strict=True)) or [(), (), ()]
    rejects_table = pa.table([pa.array(c, pa.string()) for c in columns], schema=REJECTS_SCHEMA)
    return Manifest(
        shards=tuple(
            FileEntry(name=shard_name(index), size=result.size, sha256=result.sha256, rows=result.rows)
            for index, result in kept
        ),
        row_groups=_write_table(row_groups.to_table(), ROW_GROUPS_NAME, filesystem, root),
        rejects=_write_table(rejects_table, REJECTS_NAME, filesystem, root),
        build=build.describe(),
        source={**about, "rejected": len(rejects)},
        num_images=sum(result.rows for result in results),
        num_bytes=sum(result.num_bytes for result in results),
    )


def _write_table(table: pa.Table, name: str, filesystem: pafs.FileSystem, root: str) -> FileEntry:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    with _atomically(filesystem, f"{root}/{name}") as sink:
        sink.write(data)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=len(table))


@contextmanager
def _atomically(filesystem: pafs.FileSystem, path: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: written aside and renamed, or uploaded in one piece."""
    # An object store's upload becomes visible only when it is closed; a rename there would copy.
    partial = f"{path}.partial" if isinstance(filesystem, pafs.LocalFileSystem) else path
    with filesystem.open_output_stream(partial) as sink:
        yield cast(BinaryIO, sink)
    if partial != path:
        filesystem.move(partial, path)
