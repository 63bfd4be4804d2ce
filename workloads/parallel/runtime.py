"""What a loop needs of the place it runs in: its rank, its device, and somewhere to report to.

`LocalRuntime` serves one process and torchrun. The orchestrator has a second one, over Ray Train. Loops see only the protocol.
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
from typing import Any, Literal, Protocol, TextIO

import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem

from workloads.storage.checkpoint import Restored, Snapshot
from workloads.storage.checkpoint_store import CheckpointStore, read_newest_everywhere
from workloads.storage.checkpoint_writer import CheckpointWriter

Request = Literal["go on", "save", "stop"]
"""What the surroundings ask of a loop: to take a checkpoint now, or to take one and end."""

_REQUESTS: tuple[Request, ...] = ("go on", "save", "stop")


class Runtime(Protocol):
    """The place a loop runs in. Every rank calls `report` and `request` equally often, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device and, on more than one rank, let its gradients be averaged (DDP)."""
        ...

    def report(self, metrics: Mapping[str, float], *, step: int, artifacts: Path | None = None) -> None:
        """Hand over metrics (rank 0's count) and, optionally, rank 0's folder of `artifacts`, which people look at.

        The folder is the runtime's from then on, which removes it when it has what it needs.
        """
        ...

    def restore(self) -> Restored | None:
        """The newest whole checkpoint, the same on every rank; None at the start of a run.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Have rank 0's snapshot written while training goes on.

        Raises:
            CheckpointError: an earlier one could not be written.
        """
        ...

    def flush(self) -> None:
        """Wait until the snapshots that were handed over are written.

        Raises:
            CheckpointError: one could not be.
        """
        ...

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that is written whole, or None."""
        ...

    def request(self) -> Request:
        """What is asked of the loop, the same on every rank; may wait for the others."""
        ...

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Show how far the work is; called every step, never blocks, never synchronises the device."""
        ...


def agreed(request: Request, device: torch.device) -> Request:
    """The strongest request of any rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return request
    level = torch.tensor([_REQUESTS.index(request)], device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(level, op=dist.ReduceOp.MAX)
    return _REQUESTS[int(level)]


def new_folder() -> Path:
    """A fresh local folder to write artifacts into; whoever it is reported to removes it."""
    return Path(tempfile.mkdtemp(prefix="report-"))


def pick_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def averaging_gradients(module: torch.nn.Module, device: torch.device, world_size: int) -> torch.nn.Module:
    """`module`, already on `device`, wrapped so that several ranks average its gradients (DDP)."""
    if world_size == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids)


class LocalRuntime:
    """One process, or one of torchrun's; writes `metrics.jsonl`, `checkpoints/` and `artifacts/` under `output`.

    SIGTERM asks the loop to save and stop.
    """

    def __init__(self, output: str | Path, *, stream: TextIO | None = None, keep_checkpoints: int = 2) -> None:
        self.output = Path(output)
        self.device = pick_device()
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._stream = stream if self.rank == 0 else None
        self._started = time.monotonic()
        self.checkpoints = CheckpointStore(
            LocalFileSystem(), str(self.output.absolute() / "checkpoints"), keep=keep_checkpoints
        )
        self._writer: CheckpointWriter | None = None
        self._request: Request = "go on"
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)

    def _on_sigterm(self, *_: object) -> None:
        self._request = "stop"

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

    def save(self, snapshot: Snapshot) -> None:
        if self.rank == 0:
            self._writer = self._writer or CheckpointWriter(self.checkpoints)
            self._writer.submit(snapshot)

    def saved_step(self) -> int | None:
        return max(self.checkpoints.steps(), default=None)

    def request(self) -> Request:
        return agreed(self._request, self.device)

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
        """Write what is left, and leave the process group, if this runtime joined one."""
        if self._writer is not None:
            self._writer.close()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
