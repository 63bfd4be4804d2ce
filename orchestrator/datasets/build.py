"""Building a dataset: list, place, write shards on Ray Data, drop duplicates, and commit the manifest last.

All that decides a byte is planned before the first image is read, so a shard is the same whoever writes it and whenever.
What a finished shard found out is kept beside it until the manifest stands: a build that was killed goes on from there.
"""

import hashlib
import json
import logging
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
from orchestrator.ray_support import credentials
from orchestrator.ray_support.session import join
from orchestrator.storage import object_store
from orchestrator.storage.locks import hold
from workloads.config import to_dict
from workloads.data.build.shards import (
    BuildConfig,
    ShardResult,
    place_rows,
    split_rows,
    without_repeated_ids,
)
from workloads.data.build.sources import list_source
from workloads.data.store.manifest import MANIFEST_NAME, Manifest
from workloads.errors import DataError
from workloads.storage.filesystems import read_bytes, resolve_uri

Progress = Callable[[int, int], None]


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
    state = f"{root}/{STATE_FOLDER}/{_work_key(build, about)}"
    tasks = _tasks(build, parts, state)
    filesystem.create_dir(state, recursive=True)
    for part in parts:
        filesystem.create_dir(part_folder(root, part), recursive=True)
    # No reader may see one build's manifest over another's shards.
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
    for part, manifest in manifests.items():
        commit_manifest(manifest, f"{build.output.rstrip('/')}/{part}".rstrip("/"))
        delete_leftovers(manifest, filesystem, part_folder(root, part))
    filesystem.delete_dir(f"{root}/{STATE_FOLDER}")
    return manifests


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
            text = read_bytes(filesystem, f"{part_folder(root, part)}/{MANIFEST_NAME}")
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
    return {(task.part, task.index): result for task, result in execute(again, ignore_progress)}
