"""Writes the shards of a dataset: `execute_here` in this process, `execute_on_ray` as Ray Data tasks; skips finished shards."""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator.datasets.layout import shard_name
from orchestrator.ray_support.errors import sentence
from workloads.data.build.shards import (
    BuildConfig,
    ShardResult,
    write_shard,
)
from workloads.data.build.sources import column_reader, source_reader
from workloads.errors import DataError, UserError
from workloads.storage.filesystems import atomic_write, read_bytes, resolve_uri, with_retries


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """Everything that a worker on any node needs to write one shard."""

    build: BuildConfig
    part: str  # "", "train" or "val"
    index: int  # of the shard within its part
    rows: pa.Table
    state: str  # folder, within the output's file system, of the results of finished shards
    threads: int
    excluded: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """Path or URI of the dataset that the shard belongs to."""
        return f"{self.build.output.rstrip('/')}/{self.part}".rstrip("/")


Tick = Callable[[int], None]
"""Called with the number of images done since the last call."""

Executor = Callable[[list[ShardTask], Tick], Iterator[tuple[ShardTask, ShardResult]]]


def execute_here(tasks: list[ShardTask], tick: Tick) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write shards one after the other, each on all cores of this machine."""
    for task in tasks:
        yield task, run_task(replace(task, threads=os.cpu_count() or 1), tick)


def execute_on_ray(tasks: list[ShardTask], tick: Tick) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write shards as Ray Data tasks, one a shard, over the whole cluster; yields results in the order of completion.

    Raises:
        DataError: a shard cannot be written.
    """
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
        outcome: ShardResult | UserError = pickle.loads(row["outcome"])
        if isinstance(outcome, UserError):
            raise outcome
        tick(len(task.rows))
        yield task, outcome


def ignore_progress(_: int) -> None:
    """Report no progress."""


def _run_pickled(row: dict[str, Any]) -> dict[str, Any]:
    outcome: ShardResult | UserError
    try:
        outcome = run_task(pickle.loads(row["task"]))
    except UserError as error:  # returned, because of a raised one Ray Data passes on only the text of the traceback
        outcome = error
    return {"number": row["number"], "outcome": pickle.dumps(outcome)}


def run_task(task: ShardTask, tick: Tick = ignore_progress) -> ShardResult:
    """Write one shard, unless an earlier run of the same build has written it; safe to repeat.

    Raises:
        DataError: the output cannot be written.
    """
    filesystem, folder = resolve_uri(task.folder)
    # A shard without its duplicates is another shard.
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
        with atomic_write(filesystem, note) as sink:
            sink.write(result.to_json().encode())
    except OSError as error:
        raise DataError(
            f"{task.folder}: cannot be written ({sentence(error)}); check free space, address and credentials"
        ) from None
    return result


def _write_task(task: ShardTask, filesystem: pafs.FileSystem, path: str, tick: Tick) -> ShardResult:
    column = task.build.regions.column
    with atomic_write(filesystem, path) as sink:
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
