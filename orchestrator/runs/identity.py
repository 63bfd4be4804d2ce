"""A run's identity: its name in the storage belongs to one configuration, for good."""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow.fs as arrow_fs

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.storage.locks import hold
from orchestrator.storage.object_store import HeldError
from workloads.config import config_hash, flatten
from workloads.data.store.manifest import open_dataset, resolve_uri
from workloads.errors import ConfigError, DataError
from workloads.storage.filesystems import atomic_write

T = TypeVar("T")

_RECORD, _FINISHED = "run.json", "finished.json"


class RunHeldError(ConfigError):
    """Another process drives the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run's place in the storage."""

    name: str
    claim: str  # made once, when the name is first used; the tracking server's run carries it as a tag
    config_sha256: str
    manifest_sha256: str  # of the dataset it was begun on
    filesystem: arrow_fs.FileSystem
    storage_path: str  # on `filesystem`; the run's folder is <storage_path>/<name>

    @property
    def folder(self) -> str:
        """The run's folder on `filesystem`."""
        return f"{self.storage_path}/{self.name}"


def open_storage(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path on it.

    Raises:
        ConfigError: storage.path is not a local folder or s3:// address that can be opened.
    """
    try:
        return resolve_uri(uri)
    except DataError as error:
        raise ConfigError(f"storage.path: {error}") from None


def run_name(experiment: AnyExperiment) -> str:
    """The run's name: the one asked for, else the experiment's name and the beginning of its config's hash."""
    return experiment.tracking.run_name or f"{experiment.name}-{config_hash(experiment.science)[:8]}"


@contextlib.contextmanager
def hold_run(experiment: AnyExperiment) -> Iterator[None]:
    """Be the only driver of the run's name while the context lasts; a driver that died lets go.

    Raises:
        RunHeldError: another process drives it.
        ConfigError: nothing can be written there.
    """
    name = run_name(experiment)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(f"{experiment.storage.path.rstrip('/')}/{name}", what=f"training run {name!r}"))
        except HeldError as error:
            raise RunHeldError(f"storage.path: {error}") from None
        except DataError as error:
            raise ConfigError(f"storage.path: {error}") from None
        yield


def when_free(action: Callable[[], T], *, patience_s: float) -> T:
    """`action`, tried again while another process, which may be dying, still drives its run.

    Raises:
        RunHeldError: it does so for longer than `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except RunHeldError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def claim_run(experiment: AnyExperiment, *, manifest_sha256: str) -> Run:
    """Take the run's name in the storage, or take it up again if the same configuration and data hold it.

    Raises:
        ConfigError: the name belongs to another configuration (the message names the keys), or nothing can be written.
    """
    filesystem, path = open_storage(experiment.storage.path)
    name, digest = run_name(experiment), config_hash(experiment.science)
    stored = _read(filesystem, f"{path}/{name}/{_RECORD}")
    if stored is None:
        stored = {
            "claim": uuid.uuid4().hex,
            "config_sha256": digest,
            "manifest_sha256": manifest_sha256,
            "config": flatten(experiment.science),
        }
        _write(filesystem, f"{path}/{name}", stored, uri=experiment.storage.path)
    elif stored["config_sha256"] != digest:
        changed = ", ".join(_differing_keys(stored["config"], flatten(experiment.science)))
        raise ConfigError(
            f"tracking.run_name: run {name!r} already exists with another configuration (differs in {changed}); "
            "give those keys their old values to continue it, or begin a run of another name (with init_from=CHECKPOINT, "
            "from its weights)"
        )
    elif stored["manifest_sha256"] != manifest_sha256:
        raise ConfigError(
            f"data.uri: run {name!r} was begun on another dataset (manifest {stored['manifest_sha256'][:12]}…, now "
            f"{manifest_sha256[:12]}…); give it the old data, or begin a run of another name with init_from=CHECKPOINT"
        )
    return _run(name, stored, filesystem, path)


def claim_sweep(experiment: SweepExperiment, name: str, *, identity: str, resume: bool) -> Run:
    """Take a sweep's name in the storage, or, with `resume`, take it up again if the same request holds it.

    Raises:
        ConfigError: it was begun before and is not to be resumed, or the other way round, or by another request.
    """
    filesystem, path = open_storage(experiment.storage.path)
    stored = _read(filesystem, f"{path}/{name}/{_RECORD}")
    fresh = {**flatten(experiment.science), **flatten(experiment.sweep)}
    if stored is None:
        if resume:
            raise ConfigError(f"--resume: there is no sweep {name!r} in {experiment.storage.path}")
        stored = {
            "claim": uuid.uuid4().hex,
            "config_sha256": identity,
            "manifest_sha256": open_dataset(experiment.data.uri).manifest.sha256,
            "config": fresh,
        }
        _write(filesystem, f"{path}/{name}", stored, uri=experiment.storage.path)
    elif stored["config_sha256"] != identity:
        changed = ", ".join(_differing_keys(stored["config"], fresh)) or "the kind of what was begun"
        raise ConfigError(f"tracking.run_name: {name!r} was begun with another request (differs in {changed})")
    elif not resume:
        raise ConfigError(f"sweep {name!r} was begun before: --resume continues it, tracking.run_name=… begins another")
    return _run(name, stored, filesystem, path)


def begun_run(experiment: AnyExperiment) -> Run | None:
    """The run of the experiment's name as it stands in the storage, or None."""
    filesystem, path = open_storage(experiment.storage.path)
    name = run_name(experiment)
    stored = _read(filesystem, f"{path}/{name}/{_RECORD}")
    return None if stored is None else _run(name, stored, filesystem, path)


def _run(name: str, stored: dict[str, Any], filesystem: arrow_fs.FileSystem, path: str) -> Run:
    kept = {key: stored[key] for key in ("claim", "config_sha256", "manifest_sha256")}
    return Run(name=name, filesystem=filesystem, storage_path=path, **kept)


def finished_run(run: Run) -> str | None:
    """The tracked run's id if this run has ended and all of its record is delivered, else None."""
    return (_read(run.filesystem, f"{run.folder}/{_FINISHED}") or {}).get("run_id")


def mark_finished(run: Run, run_id: str) -> None:
    """Note in the storage that nothing is left to do for this run."""
    _write_json(run.filesystem, f"{run.folder}/{_FINISHED}", {"run_id": run_id})


def _differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    fresh = json.loads(json.dumps(new))
    return sorted(key for key in old.keys() | fresh.keys() if old.get(key) != fresh.get(key))


def _read(filesystem: arrow_fs.FileSystem, path: str) -> dict[str, Any] | None:
    if filesystem.get_file_info(path).type != arrow_fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())


def _write(filesystem: arrow_fs.FileSystem, folder: str, record: dict[str, Any], *, uri: str) -> None:
    try:
        filesystem.create_dir(folder, recursive=True)
        _write_json(filesystem, f"{folder}/{_RECORD}", record)
    except OSError as error:
        raise ConfigError(f"storage.path: {uri} is not writable: {error}") from None


def _write_json(filesystem: arrow_fs.FileSystem, path: str, record: dict[str, Any]) -> None:
    with atomic_write(filesystem, path) as stream:
        stream.write(json.dumps(record, indent=1).encode())
