"""What the Ray Train controller does with a report: one line in the journal."""

from typing import Any

import ray.train

from orchestrator.ray_support.node_load import NODE, by_node
from orchestrator.runs.journal import Journal
from orchestrator.runs.records import ArtifactsRecord, MetricsRecord, Record

_NOT_METRICS = ("step", "time_ms", "artifacts", NODE)


class JournalCallback(ray.train.UserCallback):
    """Runs in the controller's process, on the driver's machine; rank 0's metrics count, and each node's load."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._journal: Journal | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Append rank 0's report, and what every worker said of its node."""
        if self._journal is None:
            self._journal = Journal(self._path)
        for record in records_of({**metrics[0], **by_node(metrics)}):
            self._journal.append(record)


def records_of(report: dict[str, Any]) -> list[Record]:
    """A worker's flat report as journal records."""
    step, time_ms = report["step"], report["time_ms"]
    metrics = {key: value for key, value in report.items() if key not in _NOT_METRICS}
    records: list[Record] = [MetricsRecord(step=step, time_ms=time_ms, metrics=metrics)] if metrics else []
    if "artifacts" in report:
        records.append(ArtifactsRecord(step=step, time_ms=time_ms, folder=report["artifacts"]))
    return records
