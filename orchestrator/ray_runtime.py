"""The `Runtime` that loops see inside a Ray Train worker."""

import os
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import ray.train
import torch
from ray.train.torch import get_device

from orchestrator.progress import ProgressPublisher
from workloads.runtime import averaging_gradients


class RayRuntime:
    """Rank, device and reporting of one Ray Train worker.

    `ray.train.report` is a barrier, and it blocks until the controller has fetched the report before. So reports go out
    from a thread of their own, in order: every rank makes the same calls, and no step waits for them.
    """

    def __init__(self, *, progress_key: str) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = get_device()
        self.first_step_time: float | None = None
        self._entered = time.time()
        self._extra: dict[str, float] = {}
        self._progress = ProgressPublisher(progress_key) if self.rank == 0 else None
        self._queue: queue.Queue[tuple[dict[str, Any], Path | None] | None] = queue.Queue()
        self._failure: BaseException | None = None
        # Asked for once: later `get_checkpoint` waits for a lock that a report under way holds.
        self._latest = _on_disk(ray.train.get_checkpoint())
        self._reporter = threading.Thread(target=self._send_reports, name="reports", daemon=True)
        self._reporter.start()

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device; with several workers, average its gradients (DDP)."""
        return averaging_gradients(module.to(self.device), self.device, self.world_size)

    def report(self, metrics: Mapping[str, float], *, step: int, folder: Path | None = None) -> None:
        """Queue metrics and, from rank 0, a folder, which belongs to this runtime from then on: sent, it is removed."""
        self._raise_failure()
        line: dict[str, Any] = {"step": step, "time_ms": int(time.time() * 1000)}
        if self.rank == 0:
            line |= {key: float(value) for key, value in metrics.items()}
            if self.first_step_time is not None:
                line |= self._extra
                self._extra = {}
            elif step == 0 and "startup/evaluation_s" not in self._extra:
                self._extra["startup/evaluation_s"] = time.time() - self._entered
        self._queue.put((line, folder))

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is on this machine's disk, or None before the first."""
        return self._latest

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Show the newest line; also notes when the first step was done."""
        if self.first_step_time is None:
            self.first_step_time = time.time()
            before = self._extra.get("startup/evaluation_s", 0.0)  # the loop may evaluate before its first step
            self._extra["startup/first_step_s"] = self.first_step_time - self._entered - before
            if "startup/began" in self._extra:
                self._extra["startup/total_s"] = self.first_step_time - self._extra.pop("startup/began")
        if self._progress is not None:
            self._progress.put(line, step=step, total_steps=total_steps)

    def add_startup(self, *, began: float, timings: Mapping[str, float]) -> None:
        """Send `timings` (seconds) with the first report after the first step; `began` is when the command began."""
        self._extra |= {"startup/began": began, **timings}

    def close(self, *, timeout_s: float | None = None) -> None:
        """Send what is still queued, for at most `timeout_s`."""
        self._queue.put(None)
        self._reporter.join(timeout_s)
        if self._progress is not None:
            self._progress.close()
        if timeout_s is None:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send_reports(self) -> None:
        while (item := self._queue.get()) is not None:
            line, folder = item
            try:
                self._send(line, folder)
            except BaseException as error:
                self._failure = error
                return
            finally:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)

    def _send(self, line: dict[str, Any], folder: Path | None) -> None:
        checkpoint = None
        if folder is not None and self.rank == 0:
            if (folder / "artifacts").is_dir():
                line["artifacts"] = _store_artifacts(folder / "artifacts", step=line["step"])
                shutil.rmtree(folder / "artifacts")
            if (folder / "state.pt").is_file():
                checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(line, checkpoint=checkpoint)
        if checkpoint is not None:
            stored = ray.train.get_checkpoint()
            if stored is not None and isinstance(stored.filesystem, arrow_fs.LocalFileSystem):
                self._latest = Path(stored.path)


def _on_disk(checkpoint: "ray.train.Checkpoint | None") -> Path | None:
    """The checkpoint's folder, fetched first if it is in an object store."""
    if checkpoint is None:
        return None
    is_local = isinstance(checkpoint.filesystem, arrow_fs.LocalFileSystem)
    return Path(checkpoint.path if is_local else checkpoint.to_directory())


def _store_artifacts(folder: Path, *, step: int) -> str:
    """Copy `folder` beside the run's checkpoints; returns where it lies within the run's storage."""
    storage = ray.train.get_context().get_storage()
    place = f"artifacts/step_{step:08d}"
    target = f"{storage.experiment_fs_path}/{place}"
    storage.storage_filesystem.create_dir(target, recursive=True)
    local, remote = arrow_fs.LocalFileSystem(), storage.storage_filesystem
    arrow_fs.copy_files(str(folder), target, source_filesystem=local, destination_filesystem=remote)
    return place


def train_worker(job: dict[str, Any]) -> dict[str, float]:
    """What every worker runs: `job` holds the science config as plain values, and how the worker is set up."""
    entered = time.time()
    _set_niceness(job["niceness"])
    torch.set_num_threads(job["threads"])
    from workloads.config import build
    from workloads.loops.pretrain import pretrain
    from workloads.spec import PretrainConfig

    runtime = RayRuntime(progress_key=job["progress_key"])
    timings = {
        **job["timings"],
        "startup/workers_s": entered - job["submitted"],
        "startup/worker_imports_s": time.time() - entered,
        "startup/worker_niceness": float(os.nice(0)),
        "startup/worker_threads": float(torch.get_num_threads()),
    }
    runtime.add_startup(began=job["began"], timings=timings)
    try:
        result = pretrain(build(PretrainConfig, job["config"]), runtime)
    except BaseException:
        runtime.close(timeout_s=5.0)  # what was measured before the failure is worth having
        raise
    runtime.close()
    return result


def _set_niceness(wanted: int) -> None:
    """Raise this process's nice level to `wanted`; lowering it is not allowed to everyone, and then it stays."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, wanted)
    except OSError:
        return
