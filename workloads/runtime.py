"""What a loop needs of the place it runs in: its rank, its device, and somewhere to report to.

`LocalRuntime` serves one process and torchrun. The orchestrator has a second one, over Ray Train. Loops see only the protocol.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist


class Runtime(Protocol):
    """The place a loop runs in. Every rank calls `report` equally often, in the same order: it may be a barrier."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device and, on more than one rank, let its gradients be averaged (DDP)."""
        ...

    def report(self, metrics: Mapping[str, float], *, step: int, folder: Path | None = None) -> None:
        """Hand over metrics (rank 0's count) and, optionally, rank 0's `folder`: a checkpoint or artifacts, kept whole.

        A folder with a `state.pt` is a checkpoint. What lies under `artifacts/` in it is shown to people. The folder is
        the runtime's from then on, which removes it when it has what it needs.
        """
        ...

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint's local folder, or None at the start of a run."""
        ...

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Show how far the work is; called every step by rank 0, never blocks, never synchronises the device."""
        ...


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
    """One process, or one of torchrun's; writes `metrics.jsonl`, `checkpoints/` and `artifacts/` under `output`."""

    def __init__(self, output: str | Path, *, stream: TextIO | None = None) -> None:
        self.output = Path(output)
        self.device = pick_device()
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._stream = stream if self.rank == 0 else None
        self._started = time.monotonic()
        if self.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        return averaging_gradients(module.to(self.device), self.device, self.world_size)

    def report(self, metrics: Mapping[str, float], *, step: int, folder: Path | None = None) -> None:
        if self.rank == 0:
            record: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **metrics}
            with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if folder is not None:
                self._keep(folder, step)
                shutil.rmtree(folder, ignore_errors=True)
            if self._stream is not None and metrics:
                self._stream.write(json.dumps(record) + "\n")
                self._stream.flush()

    def _keep(self, folder: Path, step: int) -> None:
        if (folder / "artifacts").is_dir():
            shutil.copytree(folder / "artifacts", self.output / "artifacts", dirs_exist_ok=True)
        if not (folder / "state.pt").is_file():
            return
        target = self.output / "checkpoints" / f"step_{step:08d}"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("artifacts"))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)  # a reader sees a whole checkpoint or none
        for old in sorted(target.parent.glob("step_*[0-9]"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def latest_checkpoint(self) -> Path | None:
        found = sorted((self.output / "checkpoints").glob("step_*[0-9]"))
        return found[-1] if found else None

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        if self._stream is None or step % 10:
            return
        figures = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
        self._stream.write(f"step {step}/{total_steps}  {figures}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the process group, if this runtime joined one."""
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
