"""Defines `Runtime`, the interface between a loop and the process that it runs in, and `LocalRuntime` for one process or torchrun.

A runtime gives a loop its rank, its device and a place to report to. The orchestrator has a second one, over Ray Train.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, TextIO

import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from torch.nn.parallel import DistributedDataParallel

from workloads.errors import RunStoppedError
from workloads.parallel.distributed import from_rank_0, group_for, largest_over_ranks, world_size
from workloads.storage.checkpoint import Restored, Snapshot
from workloads.storage.checkpoint_store import CheckpointStore
from workloads.storage.checkpoint_writer import CheckpointWriter

Request = Literal["go on", "save", "stop"]
"""What a loop is requested to do after a step: nothing, write a checkpoint, or write a checkpoint and end."""

_REQUESTS: tuple[Request, ...] = ("go on", "save", "stop")


class Runtime(Protocol):
    """The process that a loop runs in. Every rank calls `report` and `request` equally often, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device; with several ranks, wrap it so that its gradients are averaged (DDP)."""
        ...

    def report(self, metrics: Mapping[str, float], *, step: int, artifacts: Path | None = None) -> None:
        """Record rank 0's metrics and, optionally, rank 0's folder of `artifacts` for people to look at.

        The runtime owns the folder from then on, and removes it once it has been stored.
        """
        ...

    def restore(self) -> Restored | None:
        """The newest complete checkpoint, the same on every rank; None at the start of a run.

        Raises:
            CheckpointError: there are checkpoints, but none is complete.
        """
        ...

    def check_space(self, num_bytes: int) -> None:
        """Compare the size of one checkpoint with the free space where the run is stored; called on rank 0.

        Raises:
            ConfigError: there is no room for one.
        """
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Queue rank 0's snapshot for writing and return at once.

        Raises:
            CheckpointError: an earlier one could not be written.
        """
        ...

    def flush(self) -> None:
        """Wait until the queued snapshots are written.

        Raises:
            CheckpointError: one could not be.
        """
        ...

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that is completely written, or None."""
        ...

    def request(self) -> Request:
        """The strongest request to any rank, the same on every rank; may wait for the other ranks."""
        ...

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Show the progress of the run; called after every step, never blocks, never synchronises the device."""
        ...


def agreed(request: Request) -> Request:
    """The strongest request to any rank, exchanged between the hosts."""
    return _REQUESTS[largest_over_ranks(_REQUESTS.index(request))]


def read_newest_everywhere(store: CheckpointStore, *, device: torch.device | str = "cpu") -> Restored | None:
    """The newest complete checkpoint, chosen by rank 0 and read by every rank, so that all continue from the same step.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    if world_size() == 1:
        return store.read_newest(device=device)
    newest = store.read_newest(device=device) if dist.get_rank() == 0 else None
    step = from_rank_0(newest.meta.step if newest is not None else None)
    return store.read(step, device=device) if newest is None and step is not None else newest


def new_folder() -> Path:
    """A fresh local folder to write artifacts into; the runtime that it is reported to removes it."""
    return Path(tempfile.mkdtemp(prefix="report-"))


def pick_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def averaging_gradients(module: torch.nn.Module, device: torch.device, world_size: int) -> torch.nn.Module:
    """`module`, already on `device`, wrapped so that several ranks average its gradients (DDP).

    DDP sends rank 0's buffers to all ranks at every step, except those named in the module's `buffers_equal_on_ranks`.
    """
    if world_size == 1:
        return module
    if equal := getattr(module, "buffers_equal_on_ranks", None):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, equal)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, process_group=group_for(device))


class LocalRuntime:
    """One process, alone or one of torchrun's; writes `metrics.jsonl`, `checkpoints/` and `artifacts/` under `output`.

    Between construction and `close`, SIGTERM is a request to the loop to save and stop, or, with `interruptible`, ends the
    work at once. As a context manager it closes itself.

    Args:
        stream: where rank 0 prints records and progress, one line each.
        interruptible: for work that writes no checkpoint: SIGTERM raises `RunStoppedError` in the main thread.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        stream: TextIO | None = None,
        keep_checkpoints: int = 2,
        interruptible: bool = False,
    ) -> None:
        self.output = Path(output)
        self.device = pick_device()
        if self.device.type == "cuda":
            # NCCL and every "cuda" without an index use the current device, which is GPU 0 in all processes of torchrun.
            torch.cuda.set_device(self.device)
        self._joined_group = "WORLD_SIZE" in os.environ and not dist.is_initialized()
        if self._joined_group:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = world_size()
        self._stream = stream if self.rank == 0 else None
        self._started = time.monotonic()
        self.checkpoints = CheckpointStore(
            LocalFileSystem(), str(self.output.absolute() / "checkpoints"), keep=keep_checkpoints
        )
        self._writer: CheckpointWriter | None = None
        self._request: Request = "go on"
        self._interruptible = interruptible
        self._takes_sigterm = threading.current_thread() is threading.main_thread()
        if self._takes_sigterm:
            self._sigterm_before = signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if self._interruptible:
            raise RunStoppedError(
                "stopped on request (SIGTERM) before the end; give the same command again to repeat it"
            )
        self._request = "stop"

    def __enter__(self) -> "LocalRuntime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        return averaging_gradients(module.to(self.device), self.device, self.world_size)

    def report(self, metrics: Mapping[str, float], *, step: int, artifacts: Path | None = None) -> None:
        if self.rank == 0:
            record: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **metrics}
            with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if artifacts is not None:
                shutil.copytree(artifacts, self.output / "artifacts", dirs_exist_ok=True)
                shutil.rmtree(artifacts, ignore_errors=True)
            if self._stream is not None and metrics:
                self._stream.write(json.dumps(record) + "\n")
                self._stream.flush()

    def restore(self) -> Restored | None:
        return read_newest_everywhere(self.checkpoints, device=self.device)

    def check_space(self, num_bytes: int) -> None:
        self.checkpoints.check_space(num_bytes)

    def save(self, snapshot: Snapshot) -> None:
        if self.rank == 0:
            self._writer = self._writer or CheckpointWriter(self.checkpoints)
            self._writer.submit(snapshot)

    def saved_step(self) -> int | None:
        return max(self.checkpoints.steps(), default=None)

    def request(self) -> Request:
        return agreed(self._request)

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        if self._stream is None or step % 10:
            return
        figures = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
        self._stream.write(f"step {step}/{total_steps}  {figures}\n")
        self._stream.flush()

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Give SIGTERM back to its handler of before, write the queued snapshot, and leave the process group if this joined it."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self._takes_sigterm and in_main_thread and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, self._sigterm_before or signal.SIG_DFL)
        if self._writer is not None:
            self._writer.close()
        if self._joined_group and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
