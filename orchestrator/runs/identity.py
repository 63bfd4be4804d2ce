"""`Run` and its identity: `claim_run` binds a name in the storage to one configuration and data set, `hold_run` to one driver."""

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
from orchestrator.storage import locks
from orchestrator.storage.lock import HeldError, Lock
from workloads.config import config_hash, flatten
from workloads.data.store.manifest import open_dataset, resolve_uri
from workloads.errors import ConfigError, DataError
from workloads.storage.filesystems import atomic_write, read_bytes

T = TypeVar("T")

_RECORD, _FINISHED = "run.json", "finished.json"


class RunHeldError(ConfigError):
    """Another process drives the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run and its folder in the storage."""

    name: str
    claim: str  # unique, created with the run; a tag of its MLflow run
    config_sha256: str
    manifest_sha256: str  # of the training data
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
    """`tracking.run_name`, else the experiment's name and the first digits of its config's hash."""
    return experiment.tracking.run_name or f"{experiment.name}-{config_hash(experiment.science)[:8]}"


@contextlib.contextmanager
def hold_run(experiment: AnyExperiment) -> Iterator[Lock]:
    """Be the only driver of the run's name until the context ends or this process dies.

    Raises:
        RunHeldError: another process drives it.
        ConfigError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        with _explained():
            lock = stack.enter_context(locks.hold(_folder_uri(experiment), what=_training(experiment)))
        yield lock


def refuse_if_held(experiment: AnyExperiment) -> None:
    """Fail where `hold_run` would, quickly and without writing anything: for use before slow imports and checks.

    Raises:
        RunHeldError: another process drives the run.
        ConfigError: its storage cannot be read.
    """
    with _explained():
        locks.refuse_if_held(_folder_uri(experiment), what=_training(experiment))


def _folder_uri(experiment: AnyExperiment) -> str:
    return f"{experiment.storage.path.rstrip('/')}/{run_name(experiment)}"


def _training(experiment: AnyExperiment) -> str:
    return f"training run {run_name(experiment)!r}"


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except HeldError as error:
        raise RunHeldError(f"storage.path: {error}") from None
    except DataError as error:
        raise ConfigError(f"storage.path: {error}") from None


def when_free(action: Callable[[], T], *, patience_s: float) -> T:
    """Call `action` until no other process, which may be ending, drives its run; returns its result.

    Raises:
        RunHeldError: one does so for longer than `patience_s`.
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
    """Create the run, or resume it if its configuration and data are the same.

    Raises:
        ConfigError: the name belongs to another configuration (the message names the keys), or nothing can be written.
    """
    filesystem, path = open_storage(experiment.storage.path)
    name, digest = run_name(experiment), config_hash(experiment.science)
    stored = _read(filesystem, f"{path}/{name}")
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
            "give those keys their old values to continue it, or start a run of another name (with init_from=CHECKPOINT, "
            "from its weights)"
        )
    elif stored["manifest_sha256"] != manifest_sha256:
        raise ConfigError(
            f"data.uri: run {name!r} was started on another dataset (manifest {stored['manifest_sha256'][:12]}…, now "
            f"{manifest_sha256[:12]}…); give it the old data, or start a run of another name with init_from=CHECKPOINT"
        )
    return _run(name, stored, filesystem, path)


def claim_sweep(experiment: SweepExperiment, name: str, *, identity: str, resume: bool) -> Run:
    """Create the sweep, or, with `resume`, resume it if it exists and its request is the same.

    Raises:
        ConfigError: it exists and `resume` is false, or its request differs.
    """
    filesystem, path = open_storage(experiment.storage.path)
    stored = _read(filesystem, f"{path}/{name}")
    fresh = {**flatten(experiment.science), **flatten(experiment.sweep)}
    if stored is None:
        stored = {
            "claim": uuid.uuid4().hex,
            "config_sha256": identity,
            "manifest_sha256": open_dataset(experiment.data.uri).manifest.sha256,
            "config": fresh,
        }
        _write(filesystem, f"{path}/{name}", stored, uri=experiment.storage.path)
    elif stored["config_sha256"] != identity:
        changed = ", ".join(_differing_keys(stored["config"], fresh)) or "the kind of experiment"
        raise ConfigError(
            f"tracking.run_name: {name!r} was started with another request (differs in {changed}); give it another name"
        )
    elif not resume:
        raise ConfigError(f"sweep {name!r} was begun before: --resume continues it, tracking.run_name=… starts another")
    return _run(name, stored, filesystem, path)


def begun_run(experiment: AnyExperiment) -> Run | None:
    """The run of the experiment's name that is in the storage, or None."""
    filesystem, path = open_storage(experiment.storage.path)
    name = run_name(experiment)
    stored = _read(filesystem, f"{path}/{name}")
    return None if stored is None else _run(name, stored, filesystem, path)


def _run(name: str, stored: dict[str, Any], filesystem: arrow_fs.FileSystem, path: str) -> Run:
    kept = {key: stored[key] for key in ("claim", "config_sha256", "manifest_sha256")}
    return Run(name=name, filesystem=filesystem, storage_path=path, **kept)


def finished_run(run: Run) -> str | None:
    """The MLflow run's id if this run has ended and all of its journal is delivered, else None.

    A damaged record counts as none: the run is then completed once more from its last checkpoint, which changes nothing.
    """
    try:
        return (_read_json(run.filesystem, f"{run.folder}/{_FINISHED}") or {}).get("run_id")
    except ValueError:
        return None


def mark_finished(run: Run, run_id: str) -> None:
    """Record in the storage that the run has ended and is delivered."""
    _write_json(run.filesystem, f"{run.folder}/{_FINISHED}", {"run_id": run_id})


def _differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    fresh = json.loads(json.dumps(new))
    return sorted(key for key in old.keys() | fresh.keys() if old.get(key) != fresh.get(key))


def _read(filesystem: arrow_fs.FileSystem, folder: str) -> dict[str, Any] | None:
    """The record of the run in `folder`, or None; a damaged one counts as none while the folder has nothing else of the run.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return _read_json(filesystem, f"{folder}/{_RECORD}")
    except ValueError:
        files = filesystem.get_file_info(arrow_fs.FileSelector(folder))
        if all(file.base_name.startswith((_RECORD, ".lock", "_lock")) for file in files):
            return None
        raise ConfigError(
            f"tracking.run_name: {folder}/{_RECORD} is damaged, so which configuration the run has is unknown; restore "
            "the file, or start a run of another name with init_from=CHECKPOINT"
        ) from None


def _read_json(filesystem: arrow_fs.FileSystem, path: str) -> dict[str, Any] | None:
    if filesystem.get_file_info(path).type != arrow_fs.FileType.File:
        return None
    record = json.loads(read_bytes(filesystem, path))
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object")
    return record


def _write(filesystem: arrow_fs.FileSystem, folder: str, record: dict[str, Any], *, uri: str) -> None:
    try:
        _write_json(filesystem, f"{folder}/{_RECORD}", record)
    except OSError as error:
        raise ConfigError(f"storage.path: {uri} is not writable: {error}") from None


def _write_json(filesystem: arrow_fs.FileSystem, path: str, record: dict[str, Any]) -> None:
    with atomic_write(filesystem, path) as stream:
        stream.write(json.dumps(record, indent=1).encode())
