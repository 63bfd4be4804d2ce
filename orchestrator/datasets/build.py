"""Builds datasets of Parquet shards: `build_parts` lists a source, writes its shards, drops duplicates, and commits the manifest.

Everything that decides a byte of a shard is planned before the first image is read, so the result does not depend on which
process writes a shard, or when. The result of each finished shard is stored beside the shards until the manifest is
committed, as the last file: a build that was killed resumes from these results. `build_dataset` is the short form for a
build without `val_share`.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa

from orchestrator.datasets.commit import assemble, commit_manifest, delete_leftovers
from orchestrator.datasets.layout import STATE_FOLDER, part_folder
from orchestrator.datasets.shard_tasks import Executor, ShardTask, Tick, execute_here, execute_on_ray, ignore_progress
from orchestrator.experiments.load import absolute_uri, check_lasting
from orchestrator.ray_support.errors import sentence
from orchestrator.storage import object_store
from orchestrator.storage.lock import Lock
from orchestrator.storage.locks import hold
from workloads.config import to_dict
from workloads.data.build.shards import (
    BuildConfig,
    ShardResult,
    place_rows,
    split_rows,
    without_repeated_ids,
)
from workloads.data.build.sources import CaltechSourceConfig, CocoSourceConfig, list_source
from workloads.data.store.manifest import MANIFEST_NAME, Manifest
from workloads.errors import DataError
from workloads.storage.filesystems import read_bytes, resolve_uri

Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""


def build_dataset(build: BuildConfig, *, progress: Progress | None = None, on_ray: bool = False) -> Manifest:
    """Build as `build_parts` does, and return one manifest: that of the only part, or that of `train`."""
    return next(iter(build_parts(build, progress=progress, on_ray=on_ray).values()))


def build_parts(build: BuildConfig, *, progress: Progress | None = None, on_ray: bool = False) -> dict[str, Manifest]:
    """Convert a source to sharded Parquet; returns the manifest of each part: of "", or of "train" and "val".

    Run again after a kill, it writes only the shards that are missing and commits the same manifest. A bad image never
    fails the build: it is listed in the rejects table with the reason. With a `val_share` there are two datasets below the
    output, `train` and `val`.

    Args:
        on_ray: write shards as Ray Data tasks over the cluster; otherwise in this process, on all its cores.

    Raises:
        DataError: the source cannot be listed or has no images, or the output cannot be written or holds another dataset.
    """
    check_lasting("output", build.output)
    build = with_absolute_paths(build)
    with only_builder(build.output) as lock:
        listing, about = list_source(build.source)
        finished = _finished(build, about)
        if finished is not None:
            return finished
        try:
            return _write_parts(build, listing, about, lock, progress, on_ray)
        except OSError as error:
            raise DataError(
                f"{build.output}: cannot be written ({sentence(error)}); check free space, address and credentials"
            ) from None


def with_absolute_paths(build: BuildConfig) -> BuildConfig:
    """`build` with absolute local paths: the workers of a cluster run in other folders."""
    source = replace(build.source, inputs=tuple(absolute_uri(uri) for uri in build.source.inputs))
    if isinstance(source, CocoSourceConfig | CaltechSourceConfig) and source.annotations is not None:
        source = replace(source, annotations=absolute_uri(source.annotations))
    regions = build.regions
    if regions.panoptic is not None:
        regions = replace(regions, panoptic=replace(regions.panoptic, masks=absolute_uri(regions.panoptic.masks)))
    return replace(build, source=source, regions=regions, output=absolute_uri(build.output))


@contextmanager
def only_builder(output: str) -> Iterator[Lock]:
    """Check that the output can be written, and keep other builds out of it while the context lasts.

    Raises:
        DataError: it cannot be written, or another build runs there.
    """
    if output.startswith("s3://"):
        object_store.preflight(output)
        object_store.abort_stale_uploads(output)
    with hold(output, what="building this dataset") as lock:
        yield lock


def _write_parts(
    build: BuildConfig,
    listing: pa.Table,
    about: dict[str, Any],
    lock: Lock,
    progress: Progress | None,
    on_ray: bool,
) -> dict[str, Manifest]:
    listing, repeated = without_repeated_ids(listing)
    parts = split_rows(listing, val_share=build.val_share)
    filesystem, root = resolve_uri(build.output)
    state = f"{root}/{STATE_FOLDER}/{_work_key(build, about)}"
    tasks = _tasks(build, parts, state)
    filesystem.create_dir(state, recursive=True)
    for part in parts:
        filesystem.create_dir(part_folder(root, part), recursive=True)
    # A reader must never see the manifest of one build over the shards of another.
    for part in parts:
        with suppress(FileNotFoundError):
            filesystem.delete_file(f"{part_folder(root, part)}/{MANIFEST_NAME}")
    execute = execute_on_ray if on_ray else execute_here
    tick = _counter(len(listing), progress)
    results = {(task.part, task.index): result for task, result in execute(tasks, tick)}
    results |= _without_duplicates(tasks, results, execute)
    manifests = {
        part: assemble(build, part, about, results, repeated if part in ("", "train") else (), filesystem, root)
        for part in parts
    }
    lock.check()  # another builder that has taken over commits its own
    for part, manifest in manifests.items():
        commit_manifest(manifest, f"{build.output.rstrip('/')}/{part}".rstrip("/"))
        delete_leftovers(manifest, filesystem, part_folder(root, part))
    filesystem.delete_dir(f"{root}/{STATE_FOLDER}")
    return manifests


def _part_names(build: BuildConfig) -> tuple[str, ...]:
    return ("train", "val") if build.val_share else ("",)


def _work_key(build: BuildConfig, about: dict[str, Any]) -> str:
    """A hash that two runs of the same build share, so that a resumed build never reads the state of another one."""
    key = {
        "source": to_dict(build.source),
        "build": build.describe(),
        "about": about,
        "regions": to_dict(build.regions),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _finished(build: BuildConfig, about: dict[str, Any]) -> dict[str, Manifest] | None:
    """The manifests at the output if they are all there and of this build; None if there is work to do.

    Raises:
        DataError: they are of another build, and `overwrite` is false.
    """
    filesystem, root = resolve_uri(build.output)
    existing: dict[str, Manifest] = {}
    for part in _part_names(build):
        with suppress(FileNotFoundError, NotADirectoryError):
            text = read_bytes(filesystem, f"{part_folder(root, part)}/{MANIFEST_NAME}")
            existing[part] = Manifest.from_json(text, name=f"{build.output}/{MANIFEST_NAME}")
    if build.overwrite:
        return None
    for manifest in existing.values():
        same_source = manifest.source.get("listing_sha256") == about["listing_sha256"]
        if manifest.build != build.describe() or not same_source:
            raise DataError(
                f"{build.output}: holds another dataset (manifest {manifest.sha256[:12]}); "
                "choose another output, or set overwrite=true to replace it"
            )
    return existing if len(existing) == len(_part_names(build)) else None


def _tasks(build: BuildConfig, parts: dict[str, pa.Table], state: str) -> list[ShardTask]:
    shards = [
        (part, index, rows)
        for part, listing in parts.items()
        for index, rows in enumerate(place_rows(listing, seed=build.seed, rows_per_shard=build.rows_per_shard))
    ]
    # With fewer shards than cores, each shard uses several.
    threads = max(1, -(-(os.cpu_count() or 1) // max(1, len(shards))))
    return [
        ShardTask(build=build, part=part, index=index, rows=rows, state=state, threads=threads)
        for part, index, rows in shards
    ]


def _counter(total: int, progress: Progress | None) -> Tick:
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick


def _without_duplicates(
    tasks: list[ShardTask], results: dict[tuple[str, int], ShardResult], execute: Executor
) -> dict[tuple[str, int], ShardResult]:
    """Write each shard that holds a copy of another image again without it; returns the new results.

    The copy with the first path stays, whichever part it is in: the same image in both parts would leak from train into val.
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
    return {(task.part, task.index): result for task, result in execute(again, ignore_progress)}
