"""Writes each report that the Ray Train controller receives to the run's journal."""

from typing import Any

import ray.train

from orchestrator.ray_support.node_load import by_node
from orchestrator.runs.journal import Journal
from orchestrator.runs.records import ArtifactsRecord, MetricsRecord, Record
from orchestrator.training.reports import Report


class JournalCallback(ray.train.UserCallback):
    """Runs in the controller's process, on the driver's machine; rank 0's metrics count, and the load of every worker's node."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._journal: Journal | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Append rank 0's report and the load of the nodes."""
        if self._journal is None:
            self._journal = Journal(self._path)
        for record in records_of({**metrics[0], **by_node(metrics)}):
            self._journal.append(record)


def records_of(line: dict[str, Any]) -> list[Record]:
    """A worker's flat report as journal records."""
    report = Report.from_line(line)
    records: list[Record] = []
    if report.metrics:
        records.append(MetricsRecord(step=report.step, time_ms=report.time_ms, metrics=report.metrics))
    if report.artifacts is not None:
        records.append(ArtifactsRecord(step=report.step, time_ms=report.time_ms, folder=report.artifacts))
    return records
