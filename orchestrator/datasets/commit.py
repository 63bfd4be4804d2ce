"""Completes a dataset: `assemble` makes the manifest of its shards, `commit_manifest` writes it as the last file."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from orchestrator.datasets.layout import Reject, part_folder, shard_name
from orchestrator.storage import object_store
from workloads.data.build.rows import ImageStatistics
from workloads.data.build.shards import (
    REJECTS_SCHEMA,
    BuildConfig,
    ShardResult,
)
from workloads.data.store.manifest import MANIFEST_NAME, REJECTS_NAME, ROW_GROUPS_NAME, FileEntry, Manifest, RowGroups
from workloads.errors import DataError
from workloads.storage.filesystems import PARTIAL, atomic_write, resolve_uri


def assemble(
    build: BuildConfig,
    part: str,
    about: dict[str, Any],
    results: dict[tuple[str, int], ShardResult],
    more_rejects: tuple[Reject, ...],
    filesystem: pafs.FileSystem,
    root: str,
) -> Manifest:
    """Write the rejects table and the row-group index of one part; returns its manifest.

    Args:
        about: what the manifest says of the source.
        results: of every shard, by (part, index).

    Raises:
        DataError: the part has no image.
    """
    folder = part_folder(root, part)
    shards = [(index, results[key, index]) for key, index in sorted(results) if key == part]
    kept = [(index, result) for index, result in shards if result.rows]
    rejects = sorted([reject for _, result in shards for reject in result.rejects] + list(more_rejects))
    rejects_table = pa.table([pa.array(column, pa.string()) for column in _columns(rejects)], schema=REJECTS_SCHEMA)
    rejects_entry = _write_table(rejects_table, REJECTS_NAME, filesystem, folder)
    if not kept:
        where = f"{build.output}/{part}".rstrip("/")
        raise DataError(
            f"{where}: none of the {about['listed']} files of the source is an image of this part; see {REJECTS_NAME}"
        )
    statistics = ImageStatistics()
    for _, result in kept:
        statistics.add(result.statistics)
    return Manifest(
        shards=tuple(
            FileEntry(name=shard_name(index), size=result.size, sha256=result.sha256, rows=result.rows)
            for index, result in kept
        ),
        row_groups=_write_table(_row_groups([r for _, r in kept]).to_table(), ROW_GROUPS_NAME, filesystem, folder),
        rejects=rejects_entry,
        build=build.describe(),
        source={**about, "part": part, "rejected": len(rejects)},
        num_images=sum(result.rows for _, result in kept),
        num_bytes=statistics.num_bytes,
        statistics=statistics.summary(),
    )


def _columns(rejects: list[Reject]) -> list[tuple[str, ...]]:
    return list(zip(*rejects, strict=True)) or [(), (), ()]


def _row_groups(results: list[ShardResult]) -> RowGroups:
    counts = [len(result.row_groups) for result in results]
    groups = np.concatenate([np.array(result.row_groups, dtype=np.int64) for result in results])
    return RowGroups(
        shard=np.repeat(np.arange(len(results), dtype=np.int32), counts),
        offset=groups[:, 0],
        length=groups[:, 1],
        rows=groups[:, 2].astype(np.int32),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _write_table(table: pa.Table, name: str, filesystem: pafs.FileSystem, folder: str) -> FileEntry:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    with atomic_write(filesystem, f"{folder}/{name}") as sink:
        sink.write(data)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=len(table))


def commit_manifest(manifest: Manifest, folder: str) -> None:
    """Write the manifest atomically, as the last file: readers see the dataset from now on.

    Raises:
        DataError: on S3, another process has committed another dataset in the meantime.
    """
    data = manifest.to_json().encode()
    if not folder.startswith("s3://"):
        filesystem, root = resolve_uri(folder)
        with atomic_write(filesystem, f"{root}/{MANIFEST_NAME}") as sink:
            sink.write(data)
        return
    uri = f"{folder}/{MANIFEST_NAME}"
    if not object_store.put_if_absent(uri, data) and object_store.get_object(uri) != data:
        raise DataError(f"{uri}: another process has built another dataset here; choose another output")


def delete_leftovers(manifest: Manifest, filesystem: pafs.FileSystem, folder: str) -> None:
    """Delete the shards and partial files that the manifest does not list, left by killed builds or a replaced dataset."""
    listed = {shard.name for shard in manifest.shards}
    for info in filesystem.get_file_info(pafs.FileSelector(folder)):
        is_old_shard = info.base_name.startswith("shard-") and info.base_name not in listed
        if info.type == pafs.FileType.File and (is_old_shard or PARTIAL in info.base_name):
            filesystem.delete_file(info.path)
