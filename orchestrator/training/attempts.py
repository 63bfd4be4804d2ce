"""Judges the failed attempts at a run and records them in its journal: `Attempts`."""

import contextlib
import dataclasses
import time
from dataclasses import dataclass

from orchestrator.ray_support.gauges import count_fault
from orchestrator.ray_support.session import on_cluster
from orchestrator.runs.journal import Journal, JournalReader
from orchestrator.runs.records import FaultRecord, MetricsRecord, TagsRecord
from orchestrator.tracking.addresses import without_secrets
from orchestrator.training.failures import Decision, Failure, classify, decide
from workloads.storage.checkpoint_store import CheckpointStore
from workloads.storage.filesystems import resolve_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """The attempts of one command at one run; the driver and Ray Train's controller share the history in the journal."""

    command: str  # id that distinguishes this command's faults from those of earlier ones
    journal: str
    storage: str  # URI of the run's folder
    retries: int
    patience_s: float

    def judge(self, error: BaseException) -> tuple[Failure, Decision]:
        """Classify a failure and decide what to do about it."""
        failure = classify(error, saved_step=self._saved_step(), at_s=time.monotonic())
        return failure, decide(failure, self.earlier(), retries=self.retries, patience_s=self.patience_s)

    def earlier(self) -> list[Failure]:
        """This command's failures so far."""
        faults = [record for record in JournalReader(self.journal).read() if isinstance(record, FaultRecord)]
        return [Failure(**fault.failure) for fault in faults if fault.command == self.command]

    def record(self, failure: Failure) -> None:
        """Add a failure to the history, to the metric `fault/<kind>`, its count, and to the tag `run.faults`, all reasons."""
        journal = Journal(self.journal)
        journal.append(FaultRecord(command=self.command, failure=dataclasses.asdict(failure)))
        if on_cluster():
            count_fault(self.storage.rpartition("/")[2], failure.kind)
        failures = self.earlier()
        count = sum(other.kind == failure.kind for other in failures)
        now = int(time.time() * 1000)
        journal.append(MetricsRecord(step=_step_of(failure), time_ms=now, metrics={f"fault/{failure.kind}": count}))
        reasons = "; ".join(f"{f.kind} at step {_step_of(f)}: {f.reason}" for f in failures)
        journal.append(TagsRecord(tags={"run.faults": without_secrets(reasons)[-4000:]}))

    def _saved_step(self) -> int:
        with contextlib.suppress(OSError):
            filesystem, folder = resolve_uri(self.storage)
            return max(CheckpointStore(filesystem, f"{folder}/checkpoints").steps(), default=0)
        return max((failure.saved_step for failure in self.earlier()), default=0)


def _step_of(failure: Failure) -> int:
    return failure.saved_step if failure.step is None else failure.step
