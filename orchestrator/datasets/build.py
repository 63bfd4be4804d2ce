"""Building a dataset: list, place, write shards on Ray Data, drop duplicates, and commit the manifest last.

All that decides a byte is planned before the first image is read, so a shard is the same whoever writes it and whenever.
What a finished shard found out is kept beside it until the manifest stands: a build that was killed goes on from there.
"""

import hashlib
import json
import logging
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from orchestrator.ray_support import credentials
from orchestrator.ray_support.session import join
from orchestrator.storage import object_store
from orchestrator.storage.locks import hold
from workloads.config import to_dict
from workloads.data.build.rows import ImageStatistics
from workloads.data.build.shards import (
    REJECTS_SCHEMA,
    BuildConfig,
    ShardResult,
    place_rows,
    split_rows,
    without_repeated_ids,
    write_shard,
)
from workloads.data.build.sources import column_reader, list_source, source_reader
from workloads.data.store.manifest import MANIFEST_NAME, REJECTS_NAME, ROW_GROUPS_NAME, FileEntry, Manifest, RowGroups
from workloads.storage.filesystems import DataError, read_bytes, resolve_uri, with_retries

Progress = Callable[[int, int], None]
Reject = tuple[str, str, str]
"""(path in the source, image id, reason)"""

_STATE_FOLDER = "_build"
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """All that a worker anywhere needs to write one shard."""

    build: BuildConfig
    part: str  # "", "train" or "val"
    index: int  # of the shard within its part
    rows: pa.Table
    state: str  # folder, within the output's file system, of what finished shards found out
    threads: int
    excluded: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """Path or URI of the dataset that the shard belongs to."""
        return f"{self.build.output.rstrip('/')}/{self.part}".rstrip("/")


Tick = Callable[[int], None]
"""Told how many more images are done."""
Executor = Callable[[list[ShardTask], Tick], Iterator[tuple[ShardTask, ShardResult]]]


def build_dataset(build: BuildConfig, *, progress: Progress | None = None, on_ray: bool = False) -> Manifest:
    """Convert a source to sharded Parquet; `progress` is told (images done, images in all).

    Run again after a kill it goes on with the shards that are missing and ends with the same manifest. A bad image never
    fails the build: it goes to the rejects table with the reason. With a `val_share` there are two datasets below the
    output, `train` and `val`; the manifest of `train` is returned.

    Args:
        on_ray: write shards on Ray Data over the cluster; otherwise in this process, on all its cores.

    Raises:
        DataError: the source cannot be listed, nothing in it is an image, or the output cannot be written or holds
            another dataset.
    """
    return next(iter(build_parts(build, progress=progress, on_ray=on_ray).values()))


def build_parts(build: BuildConfig, *, progress: Progress | None = None, on_ray: bool = False) -> dict[str, Manifest]:
    """As `build_dataset`; returns the manifest of each part: of "", or of "train" and "val"."""
    with only_builder(build.output):
        return _build_parts(build, progress, on_ray)


@contextmanager
def only_builder(output: str) -> Iterator[None]:
    """See that the output can be written to, and that nobody else is building there.

    Raises:
        DataError: it cannot, or somebody is.
    """
    if output.startswith("s3://"):
        object_store.preflight(output)
        object_store.abort_stale_uploads(output)
    with hold(output, what="building this dataset"):
        yield


def _build_parts(build: BuildConfig, progress: Progress | None, on_ray: bool) -> dict[str, Manifest]:
    listing, about = list_source(build.source)
    finished = _finished(build, about)
    if finished is not None:
        return finished
    listing, repeated = without_repeated_ids(listing)
    parts = split_rows(listing, val_share=build.val_share)
    filesystem, root = resolve_uri(build.output)
    state = f"{root}/{_STATE_FOLDER}/{_work_key(build, about)}"
    tasks = _tasks(build, parts, state)
    filesystem.create_dir(state, recursive=True)
    for part in parts:
        filesystem.create_dir(_folder(root, part), recursive=True)
    # No reader may see one build's manifest over another's shards.
    for part in parts:
        with suppress(FileNotFoundError):
            filesystem.delete_file(f"{_folder(root, part)}/{MANIFEST_NAME}")
    execute = execute_on_ray if on_ray else execute_here
    tick = _counter(len(listing), progress)
    results = {(task.part, task.index): result for task, result in execute(tasks, tick)}
    results |= _without_duplicates(tasks, results, execute)
    manifests = {
        part: _assemble(build, part, about, results, repeated if part in ("", "train") else (), filesystem, root)
        for part in parts
    }
    for part, manifest in manifests.items():
        commit_manifest(manifest, f"{build.output.rstrip('/')}/{part}".rstrip("/"))
        _sweep(manifest, filesystem, _folder(root, part))
    filesystem.delete_dir(f"{root}/{_STATE_FOLDER}")
    return manifests


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.parquet"


def _folder(root: str, part: str) -> str:
    return f"{root}/{part}" if part else root


def _part_names(build: BuildConfig) -> tuple[str, ...]:
    return ("train", "val") if build.val_share else ("",)


def _work_key(build: BuildConfig, about: dict[str, Any]) -> str:
    """What two runs of one build agree in, and what the state of another build must not be mistaken for."""
    key = {
        "source": to_dict(build.source),
        "build": build.describe(),
        "about": about,
        "regions": to_dict(build.regions),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _finished(build: BuildConfig, about: dict[str, Any]) -> dict[str, Manifest] | None:
    """The manifests that already stand at the output if they are this build's; None if there is work to do."""
    filesystem, root = resolve_uri(build.output)
    found: dict[str, Manifest] = {}
    for part in _part_names(build):
        with suppress(FileNotFoundError, NotADirectoryError):
            text = read_bytes(filesystem, f"{_folder(root, part)}/{MANIFEST_NAME}")
            found[part] = Manifest.from_json(text, name=f"{build.output}/{MANIFEST_NAME}")
    if build.overwrite:
        return None
    for manifest in found.values():
        same_source = manifest.source.get("listing_sha256") == about["listing_sha256"]
        if manifest.build != build.describe() or not same_source:
            raise DataError(
                f"{build.output}: holds another dataset ({manifest.sha256[:12]}); "
                "give another output, or overwrite=true to replace it"
            )
    return found if len(found) == len(_part_names(build)) else None


def _tasks(build: BuildConfig, parts: dict[str, pa.Table], state: str) -> list[ShardTask]:
    shards = [
        (part, index, rows)
        for part, listing in parts.items()
        for index, rows in enumerate(place_rows(listing, seed=build.seed, rows_per_shard=build.rows_per_shard))
    ]
    # Few shards leave cores idle unless each one uses several.
    threads = max(1, -(-(os.cpu_count() or 1) // max(1, len(shards))))
    return [
        ShardTask(build=build, part=part, index=index, rows=rows, state=state, threads=threads)
        for part, index, rows in shards
    ]


def execute_here(tasks: list[ShardTask], tick: Tick) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write shards one after the other, each on all cores of this machine."""
    for task in tasks:
        yield task, run_task(replace(task, threads=os.cpu_count() or 1), tick)


def execute_on_ray(tasks: list[ShardTask], tick: Tick) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write shards on Ray Data: one task a shard, over the whole cluster, results as they come."""
    import ray.data

    if not tasks:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller shows images, Ray would show blocks
    rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _run_pickled,
        num_cpus=tasks[0].threads,
        memory=64 * tasks[0].build.row_group_bytes,
    )
    for row in written.iter_rows():
        task = tasks[row["number"]]
        tick(len(task.rows))
        yield task, pickle.loads(row["result"])


def _ignore(_: int) -> None:
    return None


def _run_pickled(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"], "result": pickle.dumps(run_task(pickle.loads(row["task"])))}


def run_task(task: ShardTask, tick: Tick = _ignore) -> ShardResult:
    """Write one shard, unless an earlier run of the same build has; safe to repeat.

    Raises:
        DataError: the output cannot be written.
    """
    filesystem, folder = resolve_uri(task.folder)
    # Without its duplicates a shard is another one.
    suffix = hashlib.sha256("\0".join(sorted(task.excluded)).encode()).hexdigest()[:8] if task.excluded else "all"
    note = f"{task.state}/{task.part or 'dataset'}-{task.index:06d}-{suffix}.json"
    path = f"{folder}/{shard_name(task.index)}"
    with suppress(FileNotFoundError):
        result = ShardResult.from_json(read_bytes(filesystem, note))
        if filesystem.get_file_info(path).size == result.size or not result.rows:
            tick(len(task.rows))
            return result
    try:
        attempts = 3 if isinstance(filesystem, pafs.S3FileSystem) else 1
        result = with_retries(lambda: _write_task(task, filesystem, path, tick), attempts=attempts)
        with atomic_file(filesystem, note) as sink:
            sink.write(result.to_json().encode())
    except OSError as error:
        raise DataError(f"{task.folder}: cannot be written ({error}); check space, address and credentials") from None
    return result


def _write_task(task: ShardTask, filesystem: pafs.FileSystem, path: str, tick: Tick) -> ShardResult:
    column = task.build.regions.column
    with atomic_file(filesystem, path) as sink:
        result = write_shard(
            task.rows,
            sink,
            read=source_reader(task.build.source),
            read_regions=None if column is None else column_reader(task.build.source, column.name),
            build=task.build,
            excluded=task.excluded,
            threads=task.threads,
            tick=tick,
        )
    if not result.rows:
        filesystem.delete_file(path)
    return result


def _counter(total: int, progress: Progress | None) -> Tick:
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick


def connect_ray(address: str) -> None:
    """Join the Ray cluster at `address`, or start one in this process for "local"."""
    import ray

    if not ray.is_initialized():
        dashboard = False if address == "local" else None
        # Other nodes need the address and the credentials of the object store that this process has.
        stores = credentials.gather(os.environ, s3=True)
        join(address, stores, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)


def _without_duplicates(
    tasks: list[ShardTask], results: dict[tuple[str, int], ShardResult], execute: Executor
) -> dict[tuple[str, int], ShardResult]:
    """Write the shards that hold a copy of another image once more, without it.

    The copy of the first path stays, in whichever part it is: a copy in both would leak from train into val.
    """
    copies: defaultdict[bytes, list[str]] = defaultdict(list)
    for result in results.values():
        for path, digest in zip(result.paths, result.digests, strict=True):
            copies[digest].append(path)
    excluded = frozenset(path for paths in copies.values() if len(paths) > 1 for path in sorted(paths)[1:])
    again = [
        replace(task, excluded=excluded.intersection(results[task.part, task.index].paths))
        for task in tasks
        if not excluded.isdisjoint(results[task.part, task.index].paths)
    ]
    return {(task.part, task.index): result for task, result in execute(again, _ignore)}


def _assemble(
    build: BuildConfig,
    part: str,
    about: dict[str, Any],
    results: dict[tuple[str, int], ShardResult],
    more_rejects: tuple[Reject, ...],
    filesystem: pafs.FileSystem,
    root: str,
) -> Manifest:
    folder = _folder(root, part)
    mine = [(index, results[key, index]) for key, index in sorted(results) if key == part]
    kept = [(index, result) for index, result in mine if result.rows]
    rejects = sorted([reject for _, result in mine for reject in result.rejects] + list(more_rejects))
    rejects_table = pa.table([pa.array(column, pa.string()) for column in _columns(rejects)], schema=REJECTS_SCHEMA)
    rejects_entry = _write_table(rejects_table, REJECTS_NAME, filesystem, folder)
    if not kept:
        where = f"{build.output}/{part}".rstrip("/")
        raise DataError(f"{where}: none of the {about['listed']} files listed is an image for it; see {REJECTS_NAME}")
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
    with atomic_file(filesystem, f"{folder}/{name}") as sink:
        sink.write(data)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=len(table))


def commit_manifest(manifest: Manifest, folder: str) -> None:
    """Put the manifest in place, last and whole: from now on there is a dataset.

    Raises:
        DataError: on S3, somebody else has committed another dataset there in the meantime.
    """
    data = manifest.to_json().encode()
    if not folder.startswith("s3://"):
        filesystem, root = resolve_uri(folder)
        with atomic_file(filesystem, f"{root}/{MANIFEST_NAME}") as sink:
            sink.write(data)
        return
    uri = f"{folder}/{MANIFEST_NAME}"
    if not object_store.put_if_absent(uri, data) and object_store.get_object(uri) != data:
        raise DataError(f"{uri}: somebody else has built another dataset here; give another output")


def _sweep(manifest: Manifest, filesystem: pafs.FileSystem, folder: str) -> None:
    """Remove what killed builds and a dataset that was replaced have left: files no manifest speaks of."""
    listed = {shard.name for shard in manifest.shards}
    for info in filesystem.get_file_info(pafs.FileSelector(folder)):
        is_old_shard = info.base_name.startswith("shard-") and info.base_name not in listed
        if info.type == pafs.FileType.File and (is_old_shard or _PARTIAL in info.base_name):
            filesystem.delete_file(info.path)


@contextmanager
def atomic_file(filesystem: pafs.FileSystem, path: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: written aside and renamed, or uploaded in one piece."""
    # An object store's upload becomes visible only when it is closed; a rename there would copy.
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as sink:
            yield cast(BinaryIO, sink)
        return
    partial = f"{path}{_PARTIAL}{os.getpid()}"
    try:
        with filesystem.open_output_stream(partial) as sink:
            yield cast(BinaryIO, sink)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(partial)
        raise
    filesystem.move(partial, path)
