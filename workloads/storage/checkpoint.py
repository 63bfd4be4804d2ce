"""Takes, writes and reads checkpoints: `take_snapshot`, `write_checkpoint`, `read_checkpoint`.

`<run>/checkpoints/step_00000320/` holds `state.pt` (tensors and plain values only), `config.yaml` and, written last,
`meta.json` with the SHA-256 of `state.pt`. A folder without `meta.json`, or whose `state.pt` does not match it, is not used.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import pyarrow.fs as pafs
import torch
from torch import Tensor, nn

from workloads.errors import RunFailedError
from workloads.storage.filesystems import atomic_write, read_bytes

STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"

_LOCAL = pafs.LocalFileSystem()

log = logging.getLogger(__name__)


class CheckpointError(RunFailedError):
    """A checkpoint cannot be written or used; the message names the folder and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """The contents of `meta.json`: which run and step a checkpoint belongs to, readable without torch."""

    step: int  # updates done; the run's data cursor is this times the global batch size
    config_sha256: str
    manifest_sha256: str
    state_sha256: str = ""
    state_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the evaluation at this step, if there was one


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A copy on the host of everything that is needed to continue, so that training goes on while it is written."""

    meta: CheckpointMeta
    config_yaml: str
    state: Mapping[str, Any]
    copied: tuple[torch.cuda.Event, ...] = ()

    def wait(self) -> None:
        """Return when the copies from the GPU have arrived; called by the thread that writes, not by the step."""
        for event in self.copied:
            event.synchronize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A checkpoint that was read and whose SHA-256 matches."""

    meta: CheckpointMeta
    state: Mapping[str, Any]
    passed_over: tuple[str, ...] = ()  # newer checkpoints that are damaged, each with its reason


def take_snapshot(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Mapping[str, Tensor],
    config_yaml: str,
    meta: CheckpointMeta,
) -> Snapshot:
    """Copy the state of the run to the host, without waiting for the device.

    From a GPU the copies go to pinned memory on the current stream, before the updates that follow on it; `Snapshot.wait`
    waits for them.

    Args:
        window: sums of the metrics since the last record.
    """
    devices: set[torch.device] = set()
    state = {
        "model": _on_host(model.state_dict(), devices),
        "optimizer": _on_host(optimizer.state_dict(), devices),
        "torch_rng": torch.get_rng_state(),
        "window": _on_host(window, devices),
        "step": meta.step,
    }
    copied = tuple(_event_on(device) for device in devices if device.type == "cuda")
    return Snapshot(meta=meta, config_yaml=config_yaml, state=state, copied=copied)


def _on_host(value: Any, devices: set[torch.device]) -> Any:
    """A copy of nested tensors and values; adds the tensors' devices to `devices`."""
    if isinstance(value, Tensor):
        devices.add(value.device)
        host = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _on_host(item, devices) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item, devices) for item in value)
    return value


def _event_on(device: torch.device) -> torch.cuda.Event:
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


def write_checkpoint(snapshot: Snapshot, folder: str, filesystem: pafs.FileSystem = _LOCAL) -> CheckpointMeta:
    """Write `snapshot` as `folder`, in place of what was there.

    Raises:
        OSError: the file system failed; the unfinished folder is removed if it can be.
    """
    delete_checkpoint(folder, filesystem)
    try:
        return _write_files(snapshot, folder, filesystem)
    except OSError:
        with contextlib.suppress(OSError):  # an unfinished checkpoint would take the room that the next one needs
            delete_checkpoint(folder, filesystem)
        raise


def _write_files(snapshot: Snapshot, folder: str, filesystem: pafs.FileSystem) -> CheckpointMeta:
    snapshot.wait()
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
    """Read the checkpoint in `folder`; only tensors and plain values are unpickled.

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


def read_meta(folder: str, filesystem: pafs.FileSystem = _LOCAL) -> CheckpointMeta:
    """Read the `meta.json` of the checkpoint in `folder`.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        OSError: the file system does not answer.
    """
    try:
        return CheckpointMeta(**json.loads(read_bytes(filesystem, f"{folder}/{META}")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint ({META}: {first_line(error)})") from None


def delete_checkpoint(folder: str, filesystem: pafs.FileSystem = _LOCAL) -> None:
    """Remove `folder`, its `meta.json` first."""
    for path in (f"{folder}/{META}", f"{folder}/{STATE}", f"{folder}/{CONFIG}"):
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_dir(folder)


class _HashingStream:
    """The file that `torch.save` writes to; hashes the bytes on their way, so that the state is never in memory twice."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
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
        """Nothing: every write is passed on at once."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
