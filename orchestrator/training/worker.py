"""The `Runtime` that loops see inside a Ray Train worker."""

import os
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import ray.train
import ray.util
import torch
from ray.train.torch import get_device

from orchestrator.ray_support.gauges import RunGauges
from orchestrator.ray_support.node_load import NODE, NodeLoad
from orchestrator.ray_support.spare_processes import order_later
from orchestrator.training.progress import ProgressPublisher
from orchestrator.training.unconfirmed_reports import UnconfirmedReports
from workloads.parallel.runtime import Request, agreed, averaging_gradients, read_newest_everywhere
from workloads.storage.checkpoint import Restored, Snapshot
from workloads.storage.checkpoint_store import CheckpointStore
from workloads.storage.checkpoint_writer import CheckpointWriter
from workloads.storage.filesystems import resolve_uri, with_retries


class RayRuntime:
    """Rank, device and reporting of one Ray Train worker.

    `ray.train.report` is a barrier, and it blocks until the controller has fetched the report before. So reports go out
    from a thread of their own, in order: every rank makes the same calls, and no step waits for them.
    """

    def __init__(
        self,
        *,
        progress_key: str,
        checkpoints: CheckpointStore,
        patience_s: float,
        watch_preemption: bool,
        spare: bool,
        gauges_of: str | None,
        node_load: bool,
    ) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = get_device()
        self.step: int | None = None  # updates done, as far as this rank was told
        self.first_step_time: float | None = None
        self._entered = time.time()
        self._extra: dict[str, float] = {}
        self._progress = ProgressPublisher(progress_key) if self.rank == 0 else None
        self._checkpoints = checkpoints
        self._patience_s = patience_s
        self._writer: CheckpointWriter | None = None
        self._restored_step: int | None = None
        self._watch_preemption = watch_preemption
        self._spare = spare
        self._node_load = NodeLoad(ray.util.get_node_ip_address()) if node_load else None
        self._gauges = RunGauges(gauges_of) if gauges_of is not None and self.rank == 0 else None
        self._preemption_known = False
        self._preemption_asked = float("-inf")
        self._queue: queue.Queue[tuple[dict[str, Any], Path | None] | None] = queue.Queue()
        self._unconfirmed = UnconfirmedReports()
        self._failure: BaseException | None = None
        self._reporter = threading.Thread(target=self._send_reports, name="reports", daemon=True)
        self._reporter.start()

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move `module` to the device; with several workers, average its gradients (DDP)."""
        return averaging_gradients(module.to(self.device), self.device, self.world_size)

    def report(self, metrics: Mapping[str, float], *, step: int, artifacts: Path | None = None) -> None:
        """Queue metrics and, from rank 0, a folder, which belongs to this runtime from then on: sent, it is removed."""
        self._raise_failure()
        line: dict[str, Any] = {"step": step, "time_ms": int(time.time() * 1000)}
        if self._writer is not None:
            metrics = {**metrics, "fault/checkpoint_retries": self._writer.retries} if self._writer.retries else metrics
        if self.rank == 0:
            line |= {key: float(value) for key, value in metrics.items()}
            if self.first_step_time is not None:
                line |= self._extra
                self._extra = {}
            elif step == 0 and "startup/evaluation_s" not in self._extra:
                self._extra["startup/evaluation_s"] = time.time() - self._entered
            if self._gauges is not None:
                self._gauges.report(metrics, step=step, saved_step=self.saved_step())
        if self._node_load is not None:
            line[NODE] = self._node_load.read()
        self._send(line, artifacts)

    def _send(self, line: dict[str, Any], artifacts: Path | None = None) -> None:
        self._unconfirmed.add(line)
        self._queue.put((line, artifacts))

    def restore(self) -> Restored | None:
        """The newest whole checkpoint of the run's storage, the same on every rank.

        What its writer had reported and may have died with is reported once more.
        """
        found = read_newest_everywhere(self._checkpoints, device=self.device)
        if found is not None:
            self._restored_step = found.meta.step
            self._extra["fault/damaged_checkpoints"] = float(len(found.passed_over))
            for line in found.state.get("reports", ()):  # all ranks, because a report is a barrier; rank 0's counts
                self._send(dict(line))
        return found

    def save(self, snapshot: Snapshot) -> None:
        """Hand rank 0's snapshot to the thread that writes it to the run's storage."""
        self._raise_failure()
        if self._writer is None:
            self._writer = CheckpointWriter(self._checkpoints, patience_s=self._patience_s)
        self._writer.submit(replace(snapshot, state={**snapshot.state, "reports": self._unconfirmed.lines()}))

    def flush(self) -> None:
        """Wait until the newest snapshot is in the storage."""
        if self._writer is not None:
            self._writer.flush()

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that is known to be whole."""
        written = self._writer.newest if self._writer is not None else None
        return written.step if written is not None else self._restored_step

    def request(self) -> Request:
        """`stop` once the driver passed on that it was told to end; `save` when a node of the run is about to be taken."""
        preempted = self._preempted()  # every rank asks, whatever else it knows: it is a barrier
        stop = self._progress is not None and self._progress.stop_asked
        return agreed("stop" if stop else "save" if preempted else "go on")

    def _preempted(self) -> bool:
        # Asking is a call to another process. A worker alone may skip it; several must ask equally often.
        now = time.monotonic()
        if not self._watch_preemption or (self.world_size == 1 and now - self._preemption_asked < 1.0):
            return False
        self._preemption_asked = now
        known = ray.train.get_preemption_info() is not None
        fresh, self._preemption_known = known and not self._preemption_known, known
        return fresh

    def progress(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Show the newest line; also notes when the first step was done."""
        self.step = step
        if self.first_step_time is None:
            self.first_step_time = time.time()
            if self._spare:
                order_later()
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
        if self._writer is not None:
            self._writer.close(timeout_s=timeout_s)
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
            line, artifacts = item
            try:
                if artifacts is not None:
                    line["artifacts"] = self._store_artifacts(artifacts, step=line["step"])
                ray.train.report(line)
                self._unconfirmed.sent()
            except BaseException as error:
                self._failure = error
                return
            finally:
                if artifacts is not None:
                    shutil.rmtree(artifacts, ignore_errors=True)

    def _store_artifacts(self, folder: Path, *, step: int) -> str:
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


def train_worker(job: dict[str, Any]) -> dict[str, float]:
    """What every worker runs: `job` holds the science config as plain values, and how the worker is set up."""
    entered = time.time()
    _set_niceness(job["niceness"])
    torch.set_num_threads(job["threads"])
    from workloads.loops.dispatch import build_loop, run_loop

    filesystem, folder = resolve_uri(job["storage"])
    runtime = RayRuntime(
        progress_key=job["progress_key"],
        checkpoints=CheckpointStore(
            filesystem, f"{folder}/checkpoints", keep=job["keep_checkpoints"], best_metric=job["best_metric"]
        ),
        patience_s=job["patience_s"],
        watch_preemption=job["watch_preemption"],
        spare=job["spare"],
        gauges_of=job["gauges_of"],
        node_load=job["node_load"],
    )
    timings = {
        **job["timings"],
        "startup/workers_s": entered - job["submitted"],
        "startup/worker_imports_s": time.time() - entered,
        "startup/worker_niceness": float(os.nice(0)),
        "startup/worker_threads": float(torch.get_num_threads()),
    }
    runtime.add_startup(began=job["began"], timings=timings)
    try:
        result = run_loop(build_loop(job["config"]), runtime)
    except BaseException as error:
        error.at_step = runtime.step  # type: ignore[attr-defined]  # tells a fault that recurs from one in passing
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
