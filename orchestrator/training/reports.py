"""A worker's reports: the `Report` itself, the `ReportSender` thread that sends them, and the `UnconfirmedReports` to send again."""

import collections
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train

from orchestrator.ray_support.node_load import NODE

# `ray.train.report` returns when the controller has fetched the report before, which it may not have written down yet.
_MAY_BE_LOST = 2
_STAMP = ("step", "time_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank sends after a step; every rank sends equally many, and rank 0's metrics count."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]
    node: Mapping[str, Any] | None = None
    """The load of the worker's node, as `NodeLoad.read` gives it."""
    artifacts: str | None = None
    """Folder of figures within the run's folder."""

    def to_line(self) -> dict[str, Any]:
        """The flat dictionary that Ray Train, Tune's callback and checkpoints carry."""
        line: dict[str, Any] = {"step": self.step, "time_ms": self.time_ms, **self.metrics}
        if self.node is not None:
            line[NODE] = dict(self.node)
        if self.artifacts is not None:
            line["artifacts"] = self.artifacts
        return line

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "Report":
        """The inverse of `to_line`."""
        metrics = {key: value for key, value in line.items() if key not in (*_STAMP, "artifacts", NODE)}
        stamp = {key: line[key] for key in _STAMP}
        return cls(**stamp, metrics=metrics, node=line.get(NODE), artifacts=line.get("artifacts"))


class UnconfirmedReports:
    """Rank 0's reports that the driver may not have stored: all that were not sent, and the last two that were.

    They are saved with each checkpoint, and sent again by the run that resumes from it; what had arrived is not counted twice.
    Safe for two threads.
    """

    def __init__(self) -> None:
        self._reports: collections.deque[Report] = collections.deque()
        self._sent = 0
        self._lock = threading.Lock()

    def add(self, report: Report) -> None:
        """Add a report that is about to be queued, without its node's load and its artifacts, which do not outlive a node."""
        with self._lock:
            self._reports.append(replace(report, node=None, artifacts=None))

    def sent(self) -> None:
        """Count the oldest report that was not sent as sent."""
        with self._lock:
            self._sent += 1
            if self._sent > _MAY_BE_LOST:
                self._sent -= 1
                self._reports.popleft()

    def lines(self) -> list[dict[str, Any]]:
        """All that may not have arrived, the oldest first, as a checkpoint stores them."""
        with self._lock:
            return [report.to_line() for report in self._reports]


class ReportSender:
    """Sends reports through `ray.train.report` from a thread, in order.

    `ray.train.report` is a barrier, and it blocks until the controller has fetched the report before. From a thread, every
    rank makes the same calls and no step waits for them.

    Args:
        store_artifacts: copies a folder to the run's storage; returns where it lies within the run's folder.
    """

    def __init__(self, store_artifacts: Callable[[Path, int], str]) -> None:
        self._store_artifacts = store_artifacts
        self._queue: queue.Queue[tuple[Report, Path | None] | None] = queue.Queue()
        self.unconfirmed = UnconfirmedReports()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def send(self, report: Report, artifacts: Path | None = None) -> None:
        """Queue a report and, from rank 0, a local folder, which is removed once it is stored or cannot be.

        Raises:
            BaseException: what stopped an earlier report.
        """
        if self._failure is not None and artifacts is not None:
            shutil.rmtree(artifacts, ignore_errors=True)
        self.raise_failure()
        self.unconfirmed.add(report)
        self._queue.put((report, artifacts))

    def close(self, timeout_s: float | None) -> None:
        """Send what is queued, for at most `timeout_s`, then end the thread."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def raise_failure(self) -> None:
        """Raise what stopped an earlier report, if something did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            report, artifacts = item
            try:
                if self._failure is None:  # after a failure the queue is only emptied, and its folders removed
                    self._send(report, artifacts)
            except BaseException as error:
                self._failure = error
            finally:
                if artifacts is not None:
                    shutil.rmtree(artifacts, ignore_errors=True)

    def _send(self, report: Report, artifacts: Path | None) -> None:
        if artifacts is not None:
            report = replace(report, artifacts=self._store_artifacts(artifacts, report.step))
        ray.train.report(report.to_line())
        self.unconfirmed.sent()
