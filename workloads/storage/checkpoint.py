"""Checkpoints: complete, whole or absent, checked by hash, written beside the steps.

`<run>/checkpoints/step_00000320/` holds `state.pt` (tensors and plain values only), `config.yaml` and, written last,
`meta.json` with the hash of `state.pt`: without it there is no checkpoint, and one that does not match it is passed over.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch import nn

from workloads.storage.filesystems import is_final, read_bytes

STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"
_NAME = re.compile(r"step_(\d{8,})")
_BEST = "best"

_LOCAL = pafs.LocalFileSystem()

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written or used; the message names the folder and why."""


class CheckpointWriteError(CheckpointError):
    """The store did not take a checkpoint for as long as the run had patience."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint belongs to, readable without torch."""

    step: int  # updates done; the run's data cursor is this times the global batch size
    config_sha256: str
    manifest_sha256: str
    state_sha256: str = ""
    state_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)  # what was known of the model when it was taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that is needed to continue, copied to the host: training may go on while it is written."""

    meta: CheckpointMeta
    config_yaml: str
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A checkpoint that was read and whose hash was right."""

    meta: CheckpointMeta
    state: Mapping[str, Any]
    passed_over: tuple[str, ...] = ()  # newer ones that are damaged, each with its reason


def take_snapshot(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Mapping[str, torch.Tensor],
    config_yaml: str,
    meta: CheckpointMeta,
) -> Snapshot:
    """Copy the state of the run to the host.

    Args:
        window: sums of the metrics since the last record.
    """
    state = {
        "model": _on_host(model.state_dict()),
        "optimizer": _on_host(optimizer.state_dict()),
        "torch_rng": torch.get_rng_state(),
        "window": _on_host(window),
        "step": meta.step,
    }
    return Snapshot(meta=meta, config_yaml=config_yaml, state=state)


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item) for item in value)
    return value


class CheckpointStore:
    """The checkpoints of one run, in a local folder or an object store: the newest few, and the best by one metric.

    Args:
        keep: how many of the newest stay.
        best_metric: a copy of the checkpoint that has the highest value of it stays under `best/`; none: no such copy.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, folder: str, *, keep: int = 2, best_metric: str | None = None
    ) -> None:
        self.filesystem, self.folder = filesystem, folder.rstrip("/")
        self._keep, self._best_metric = keep, best_metric

    def path_of(self, step: int) -> str:
        """Where the checkpoint of `step` lies."""
        return f"{self.folder}/step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole as far as its `meta.json` says, ascending."""
        return self._listed(self.folder)

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write `snapshot`, then drop what is older than the newest few; a reader sees it whole or not at all.

        Raises:
            OSError: nothing is lost but the unfinished folder; it can be tried again.
        """
        meta = write_checkpoint(snapshot, self.path_of(snapshot.meta.step), self.filesystem)
        self._keep_best(snapshot)
        stays = [step for step in self.steps() if step <= meta.step][-self._keep :]  # later ones were passed over
        for step in self._begun():
            if step < meta.step and step not in stays:  # older, or left unfinished by a process that was killed
                self.delete(step)
        return meta

    def delete(self, step: int) -> None:
        """Remove the checkpoint of `step`, its `meta.json` first."""
        delete_checkpoint(self.path_of(step), self.filesystem)

    def read(self, step: int, *, device: torch.device | str = "cpu") -> Restored:
        """The checkpoint of `step`.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_checkpoint(self.path_of(step), self.filesystem, device=device)

    def read_newest(self, *, device: torch.device | str = "cpu") -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.read(step, device=device)
            except CheckpointError as error:
                _log.warning("%s; falling back to the one before it", error)
                damaged.append(str(error))
                continue
            return Restored(meta=found.meta, state=found.state, passed_over=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged ({damaged[0]}); "
                "remove the folder to start this run from its beginning"
            )
        return None

    def best(self) -> tuple[int, str] | None:
        """Step and place of the checkpoint with the highest `best_metric`, or None."""
        steps = self._listed(f"{self.folder}/{_BEST}")
        return (steps[-1], f"{self.folder}/{_BEST}/step_{steps[-1]:08d}") if steps else None

    def _begun(self) -> list[int]:
        """Steps that have anything of a checkpoint."""
        paths = self.filesystem.get_file_info(pafs.FileSelector(self.folder, recursive=True))
        places = (info.path[len(self.folder) :].strip("/").split("/")[0] for info in paths)
        return sorted({int(named.group(1)) for named in map(_NAME.fullmatch, places) if named})

    def _listed(self, folder: str) -> list[int]:
        selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
        steps = []
        for info in self.filesystem.get_file_info(selector):
            place = info.path[len(folder) :].strip("/").split("/")
            named = _NAME.fullmatch(place[0])
            if named and len(place) == 2 and place[1] == META:
                steps.append(int(named.group(1)))
        return sorted(steps)

    def _keep_best(self, snapshot: Snapshot) -> None:
        if self._best_metric is None or self._best_metric not in snapshot.meta.metrics:
            return
        place = f"{self.folder}/{_BEST}"
        before = self._listed(place)
        known = [read_meta(f"{place}/step_{step:08d}", self.filesystem).metrics for step in before]
        value = snapshot.meta.metrics[self._best_metric]
        if value > max((metrics.get(self._best_metric, -math.inf) for metrics in known), default=-math.inf):
            write_checkpoint(snapshot, f"{place}/step_{snapshot.meta.step:08d}", self.filesystem)
            for step in before:
                if step != snapshot.meta.step:
                    delete_checkpoint(f"{place}/step_{step:08d}", self.filesystem)


def write_checkpoint(snapshot: Snapshot, folder: str, filesystem: pafs.FileSystem = _LOCAL) -> CheckpointMeta:
    """Write `snapshot` as `folder`, in place of what was there.

    Raises:
        OSError: the file system; what is there then is no checkpoint.
    """
    delete_checkpoint(folder, filesystem)
    try:
        return _write_files(snapshot, folder, filesystem)
    except OSError:
        with contextlib.suppress(OSError):  # what is unfinished would take the room that the next one needs
            delete_checkpoint(folder, filesystem)
        raise


def _write_files(snapshot: Snapshot, folder: str, filesystem: pafs.FileSystem) -> CheckpointMeta:
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/{STATE}") as stream:
        hashed = _HashingStream(stream)
        try:
            torch.save(dict(snapshot.state), hashed)  # type: ignore[arg-type]
        except Exception as error:
            raise hashed.error or error from None  # torch hides a full disk behind an error of its own
    meta = asdict(snapshot.meta) | {"state_sha256": hashed.digest.hexdigest(), "state_bytes": hashed.size}
    for name, text in ((CONFIG, snapshot.config_yaml), (META, json.dumps(meta))):
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(text.encode())
    return CheckpointMeta(**meta)


def read_checkpoint(
    folder: str, filesystem: pafs.FileSystem = _LOCAL, *, device: torch.device | str = "cpu"
) -> Restored:
    """The checkpoint in `folder`; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: missing or damaged.
        OSError: the file system does not answer; a later try may succeed.
    """
    meta = read_meta(folder, filesystem)
    try:
        data = read_bytes(filesystem, f"{folder}/{STATE}")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint (no {STATE})") from None
    if hashlib.sha256(data).hexdigest() != meta.state_sha256:
        raise CheckpointError(
            f"{folder}: {STATE} is damaged ({len(data)} bytes do not match the SHA-256 of {meta.state_bytes} bytes)"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds
        raise CheckpointError(f"{folder}: {STATE} cannot be read ({_first_line(error)})") from None
    return Restored(meta=meta, state=state)


def delete_checkpoint(folder: str, filesystem: pafs.FileSystem = _LOCAL) -> None:
    """Remove `folder`, its `meta.json` first."""
    for path in (f"{folder}/{META}", f"{folder}/{STATE}", f"{folder}/{CONFIG}"):
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_dir(folder)


class _HashingStream:
    """What `torch.save` writes to: hashed on its way, so that the state is never in memory twice."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        try:
            self._stream.write(view)
        except OSError as error:
            self.error = error
            raise
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back here."""


def read_meta(folder: str, filesystem: pafs.FileSystem = _LOCAL) -> CheckpointMeta:
    """What the checkpoint in `folder` belongs to.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        OSError: the file system does not answer.
    """
    try:
        return CheckpointMeta(**json.loads(read_bytes(filesystem, f"{folder}/{META}")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint ({META}: {_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Writes(Protocol):
    """The part of a store that the writer needs."""

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write it; may raise OSError and be asked again."""
        ...


class CheckpointWriter:
    """Writes snapshots in order on a thread of its own; what fails is tried again while training goes on.

    A newer snapshot takes the place of one that waits or could not be written so far, so that an object store's outage
    costs memory for two, not for as many as fall due meanwhile.

    Args:
        patience_s: how long writing may fail before the run is stopped.
    """

    def __init__(self, store: Writes, *, patience_s: float = 300.0, first_wait_s: float = 0.5) -> None:
        self._store, self._patience_s, self._first_wait_s = store, patience_s, first_wait_s
        self._waiting: Snapshot | None = None
        self._busy = self._closing = False
        self._failure: CheckpointError | None = None
        self._changed = threading.Condition()
        self.newest: CheckpointMeta | None = None
        """The newest checkpoint that is written whole by this writer."""
        self.seconds = 0.0
        """Time spent writing, cumulative."""
        self.retries = 0
        """Writes that failed and were tried again, cumulative."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Have `snapshot` written; returns at once.

        Raises:
            CheckpointError: an earlier one could not be written.
        """
        with self._changed:
            self._raise()
            self._waiting = snapshot
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if a checkpoint could not be written."""
        with self._changed:
            self._raise()

    def flush(self) -> None:
        """Wait until everything that was submitted is written.

        Raises:
            CheckpointError: it could not be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._busy or self._waiting))
            self._raise()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Write what waits, for at most `timeout_s`, then stop; errors were or will be told by `flush`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    return
                self._busy = True
            failure = self._write(snapshot)
            del snapshot  # its copy of all weights would otherwise live until the next checkpoint
            with self._changed:
                self._busy = False
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _write(self, snapshot: Snapshot) -> CheckpointError | None:
        deadline = time.monotonic() + self._patience_s
        for wait_s in _waits(self._first_wait_s):
            with self._changed:
                if self._waiting is not None:  # newer than what could not be written so far
                    snapshot, self._waiting = self._waiting, None
            started = time.perf_counter()
            try:
                self.newest = self._store.write(snapshot)
            except Exception as error:
                self.retries += 1
                if is_final(error) or time.monotonic() + wait_s > deadline:
                    whole = (
                        f"the newest whole one is of step {self.newest.step}" if self.newest else "none was written yet"
                    )
                    return CheckpointWriteError(
                        f"the checkpoint of step {snapshot.meta.step} cannot be written: {_first_line(error)}; {whole}; "
                        "see that storage.path can be written and has room, then give the same command again"
                    )
                _log.warning(
                    "checkpoint of step %d: not written (%s), trying again", snapshot.meta.step, _first_line(error)
                )
            else:
                return None
            finally:
                self.seconds += time.perf_counter() - started
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def _waits(first_s: float, longest_s: float = 15.0) -> Iterator[float]:
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.5, 1.0)
        wait_s = min(2 * wait_s, longest_s)


def read_newest_everywhere(store: CheckpointStore, *, device: torch.device | str = "cpu") -> Restored | None:
    """What `store.read_newest` gives on rank 0, read by every rank: all continue from the same step.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return store.read_newest(device=device)
    found = store.read_newest(device=device) if dist.get_rank() == 0 else None
    step = torch.tensor([found.meta.step if found is not None else -1], dtype=torch.int64)
    on_gpu = dist.get_backend() == "nccl"
    step = step.to(device) if on_gpu else step
    dist.broadcast(step, src=0)
    if found is None and int(step) >= 0:
        found = store.read(int(step), device=device)
    return found
