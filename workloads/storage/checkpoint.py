"""Checkpoints: complete, whole or absent, checked by hash, written beside the steps.

`<run>/checkpoints/step_00000320/` holds `state.pt` (tensors and plain values only), `config.yaml` and, written last,
`meta.json` with the hash of `state.pt`: without it there is no checkpoint, and one that does not match it is passed over.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.fs as pafs
import torch
from torch import nn

from workloads.errors import RunFailedError
from workloads.storage.filesystems import atomic_write, read_bytes

STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"

_LOCAL = pafs.LocalFileSystem()

log = logging.getLogger(__name__)


class CheckpointError(RunFailedError):
    """A checkpoint cannot be written or used; the message names the folder and why."""


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
    with atomic_write(filesystem, f"{folder}/{STATE}", attempts=1) as stream:
        hashed = _HashingStream(stream)
        try:
            torch.save(dict(snapshot.state), hashed)  # type: ignore[arg-type]
        except Exception as error:
            raise hashed.error or error from None  # torch hides a full disk behind an error of its own
    meta = asdict(snapshot.meta) | {"state_sha256": hashed.digest.hexdigest(), "state_bytes": hashed.size}
    for name, text in ((CONFIG, snapshot.config_yaml), (META, json.dumps(meta))):
        with atomic_write(filesystem, f"{folder}/{name}", attempts=1) as stream:
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
        raise CheckpointError(f"{folder}: {STATE} cannot be read ({first_line(error)})") from None
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
        raise CheckpointError(f"{folder}: not a checkpoint ({META}: {first_line(error)})") from None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
