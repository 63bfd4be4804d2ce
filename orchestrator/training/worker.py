"""Runs a training loop inside a Ray Train worker: `train_worker`, and the `RayRuntime` that the loop reports to."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as arrow_fs
import ray.train
import ray.util
import torch
from ray.train.torch import get_device

from orchestrator.ray_support.gauges import RunGauges
from orchestrator.ray_support.node_load import NodeLoad
from orchestrator.ray_support.spare_processes import order_later
from orchestrator.training.progress import ProgressPublisher
from orchestrator.training.reports import Report, ReportSender
from workloads.parallel.runtime import Request, agreed, averaging_gradients, read_newest_everywhere
from workloads.storage.checkpoint import Restored, Snapshot
from workloads.storage.checkpoint_store import CheckpointStore
from workloads.storage.checkpoint_writer import CheckpointWriter
from workloads.storage.filesystems import resolve_uri, with_retries


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """Everything that a worker needs to know of its run."""

    config: Mapping[str, Any]
    """The science config as plain values."""
    storage: str
    """URI of the run's folder."""
    keep_checkpoints: int
    best_metric: str | None
    patience_s: float
    niceness: int
    threads: int
    progress_key: str
    """Of progress and stop requests in the key-value store."""
    watch_preemption: bool
    """Ask Ray Train for notices that a node will be taken."""
    standby: bool
    """Order a standby process after the first step."""
    node_load: bool
    """Send the node's load with each report."""
    gauges_of: str | None
    """Run name of the Prometheus gauges; None: none."""
    began: float
    """When the command began, seconds since the epoch."""
    timings: Mapping[str, float]
    """Seconds of the driver's phases."""
    submitted: float
    """When the driver started the attempt, seconds since the epoch."""


class RayRuntime:
    """The `Runtime` of one Ray Train worker: its rank and device, reports, checkpoints, progress and requests to stop."""

    def __init__(self, job: WorkerJob) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = get_device()
        self.step: int | None = None
        """Updates done, as far as this rank knows."""
        self._job = job
        self._first_step_time: float | None = None
        self._entered = time.time()
        self._extra: dict[str, float] = {}
        self._progress = ProgressPublisher(job.progress_key) if self.rank == 0 else None
        filesystem, folder = resolve_uri(job.storage)
        self._checkpoints = CheckpointStore(
            filesystem, f"{folder}/checkpoints", keep=job.keep_checkpoints, best_metric=job.best_metric
        )
        self._writer: CheckpointWriter | None = None
        self._restored_step: int | None = None
        self._node_load = NodeLoad(ray.util.get_node_ip_address()) if job.node_load else None
        self._gauges = RunGauges(job.gauges_of) if job.gauges_of is not None and self.rank == 0 else None
        self._preemption_known = False
        self._preemption_asked = float("-inf")
        self._sender = ReportSender(self._store_artifacts)

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device; with several workers, average its gradients (DDP)."""
        return averaging_gradients(module.to(self.device), self.device, self.world_size)

    def report(self, metrics: Mapping[str, float], *, step: int, artifacts: Path | None = None) -> None:
        """Queue metrics and, from rank 0, a folder, which this runtime removes once it is sent."""
        sent: dict[str, float] = {}
        if self.rank == 0:
            sent = {key: float(value) for key, value in metrics.items()}
            if self._writer is not None and self._writer.retries:
                sent["fault/checkpoint_retries"] = float(self._writer.retries)
            if self._first_step_time is not None:
                sent |= self._extra
                self._extra = {}
            elif step == 0 and "startup/evaluation_s" not in self._extra:
                self._extra["startup/evaluation_s"] = time.time() - self._entered
            if self._gauges is not None:
                self._gauges.report(metrics, step=step, saved_step=self.saved_step())
        load = self._node_load.read() if self._node_load is not None else None
        report = Report(step=step, time_ms=int(time.time() * 1000), metrics=sent, node=load)
        self._sender.send(report, artifacts)

    def restore(self) -> Restored | None:
        """The newest complete checkpoint of the run's storage, the same on every rank.

        The reports that its writer had not confirmed are sent once more.
        """
        started = time.time()
        restored = read_newest_everywhere(self._checkpoints, device=self.device)
        if restored is not None:
            self._restored_step = restored.meta.step
            self._extra["fault/damaged_checkpoints"] = float(len(restored.passed_over))
            for line in restored.state.get("reports", ()):  # all ranks, because a report is a barrier; rank 0's counts
                self._sender.send(Report.from_line(line))
        self._extra["startup/restore_s"] = time.time() - started
        return restored

    def check_space(self, num_bytes: int) -> None:
        """Compare the size of one checkpoint with the free space of the run's storage."""
        self._checkpoints.check_space(num_bytes)

    def save(self, snapshot: Snapshot) -> None:
        """Hand rank 0's snapshot to the thread that writes it to the run's storage."""
        self._sender.raise_failure()
        if self._writer is None:
            warn = self._progress.warn if self._progress is not None else None
            self._writer = CheckpointWriter(self._checkpoints, patience_s=self._job.patience_s, warn=warn)
        self._writer.submit(replace(snapshot, state={**snapshot.state, "reports": self._sender.unconfirmed.lines()}))

    def flush(self) -> None:
        """Wait until the newest snapshot is in the storage."""
        if self._writer is not None:
            self._writer.flush()

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that is known to be complete."""
        written = self._writer.newest if self._writer is not None else None
        return written.step if written is not None else self._restored_step

    def request(self) -> Request:
        """`stop` when the driver asked the run to end; `save` when Ray gave notice that a node will be taken."""
        preempted = self._preempted()  # every rank asks, whatever else it knows: it is a barrier
        stop = self._progress is not None and self._progress.stop_asked
        return agreed("stop" if stop else "save" if preempted else "go on")

    def _preempted(self) -> bool:
        # Asking is a call to another process. A worker alone may skip it; several must ask equally often.
        now = time.monotonic()
        if not self._job.watch_preemption or (self.world_size == 1 and now - self._preemption_asked < 1.0):
            return False
        self._preemption_asked = now
        known = ray.train.get_preemption_info() is not None
        fresh, self._preemption_known = known and not self._preemption_known, known
        return fresh

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Publish the newest line, and note when the first step was done."""
        self.step = step
        if self._first_step_time is None:
            self._first_step_time = time.time()
            if self._job.standby:
                order_later()
            before = self._extra.get("startup/evaluation_s", 0.0)  # the loop may evaluate before its first step
            self._extra["startup/first_step_s"] = self._first_step_time - self._entered - before
            if "startup/began" in self._extra:
                self._extra["startup/total_s"] = self._first_step_time - self._extra.pop("startup/began")
        if self._progress is not None:
            self._progress.put(line, step=step, total_steps=total_steps)

    def add_startup(self, *, began: float, timings: Mapping[str, float]) -> None:
        """Send `timings` (seconds) with the first report after the first step; `began` is when the command began."""
        self._extra |= {"startup/began": began, **timings}

    def close(self, *, timeout_s: float | None = None) -> None:
        """Write and send what is still queued, for at most `timeout_s`."""
        if self._writer is not None:
            self._writer.close(timeout_s=timeout_s)
        self._sender.close(timeout_s)
        if self._progress is not None:
            self._progress.close()
        if timeout_s is None:
            self._sender.raise_failure()

    def _store_artifacts(self, folder: Path, step: int) -> str:
        """Copy `folder` beside the run's checkpoints; returns where it lies within the run's folder."""
        place = f"artifacts/step_{step:08d}"
        filesystem = self._checkpoints.filesystem
        target = f"{self._checkpoints.folder.rpartition('/')[0]}/{place}"

        def copy() -> None:
            filesystem.create_dir(target, recursive=True)
            arrow_fs.copy_files(
                str(folder), target, source_filesystem=arrow_fs.LocalFileSystem(), destination_filesystem=filesystem
            )

        with_retries(copy)
        return place


def train_worker(config: Mapping[str, WorkerJob]) -> dict[str, float]:
    """Run the loop of `config["job"]` in this worker process."""
    job = config["job"]
    entered = time.time()
    _set_niceness(job.niceness)
    torch.set_num_threads(job.threads)
    from workloads.loops.dispatch import build_loop, run_loop

    runtime = RayRuntime(job)
    timings = {
        **job.timings,
        "startup/workers_s": entered - job.submitted,
        "startup/process_age_s": entered - psutil.Process().create_time(),
        "startup/worker_imports_s": time.time() - entered,
        "startup/worker_niceness": float(os.nice(0)),
        "startup/worker_threads": float(torch.get_num_threads()),
    }
    runtime.add_startup(began=job.began, timings=timings)
    try:
        result = run_loop(build_loop(job.config), runtime)
    except BaseException as error:
        error.at_step = runtime.step  # type: ignore[attr-defined]  # distinguishes a recurring fault from a transient one
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
