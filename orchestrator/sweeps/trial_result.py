"""`TrialResult`: what one trial of a sweep measured and how it ended, read from its journal by `read_result`.

`snapshot_trials` reads from Ray Tune's own snapshot which trials a stage has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.fs as arrow_fs
from ray import tune
from ray.tune.experiment import Trial

from orchestrator.experiments.domains import Point
from orchestrator.experiments.spec import TrainExperiment
from orchestrator.runs.identity import begun_run, finished_run
from orchestrator.runs.journal_access import read_records
from orchestrator.runs.records import FaultRecord, MetricsRecord, Record, TagsRecord
from orchestrator.sweeps.stages import Stage, score_of
from workloads.errors import ConfigError
from workloads.storage.filesystems import is_outage


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The evaluations and the outcome of one trial."""

    point: Point
    experiment: TrainExperiment | None  # None: the values of the point contradict each other
    run_name: str
    evaluations: Mapping[int, Mapping[str, float]]  # step → metrics
    rank_by: tuple[str, ...]
    reason: str | None = None  # why it failed
    ended: bool = False  # it ran to its last step
    interrupted: bool = False  # the sweep was stopped first
    seconds: float = 0.0  # from its start to its last report, over all attempts

    @property
    def step(self) -> int:
        """The step of the last evaluation; 0 if there is none."""
        return max(self.evaluations, default=0)

    @property
    def score(self) -> float | None:
        """The score at `step`."""
        return self.score_at(self.step)

    def score_at(self, step: int) -> float | None:
        """The mean of the `rank_by` metrics at `step`, or None if they were not measured there."""
        return score_of(self.evaluations[step], self.rank_by) if step in self.evaluations else None

    @property
    def outcome(self) -> str:
        """`finished`, `stopped early` (by the early stopper or the time limit), `failed`, or `unfinished`."""
        if self.reason:
            return "failed"
        return "finished" if self.ended else "unfinished" if self.interrupted else "stopped early"


def read_result(stage: Stage, point: Point, *, reason: str | None, interrupted: bool) -> TrialResult:
    """The result of the trial at `point`, from the journal of its run."""
    rank_by = stage.sweep.sweep.rank_by
    try:
        experiment = stage.experiment(point)
    except ConfigError as error:
        return TrialResult(
            point=point, experiment=None, run_name="", evaluations={}, rank_by=rank_by, reason=str(error)
        )
    records = read_records(experiment)
    measured = [r for r in records if isinstance(r, MetricsRecord) and score_of(r.metrics, rank_by) is not None]
    run = begun_run(experiment)
    return TrialResult(
        point=point,
        experiment=experiment,
        run_name=experiment.tracking.run_name or "",
        evaluations={r.step: r.metrics for r in measured},
        rank_by=rank_by,
        reason=reason,
        interrupted=interrupted,
        ended=run is not None and finished_run(run) is not None,
        seconds=_seconds(records),
    )


def _seconds(records: Sequence[Record]) -> float:
    """Time from the start of each attempt, which a record of tags marks, to its last record, summed."""
    total, began, last = 0.0, None, 0.0
    for record in records:
        if isinstance(record, FaultRecord) or record.time_ms is None:
            continue
        if isinstance(record, TagsRecord):
            total += last - began if began is not None else 0.0
            began = last = record.time_ms / 1000
        else:
            last = max(last, record.time_ms / 1000)
    return total + (last - began if began is not None else 0.0)


def snapshot_trials(filesystem: arrow_fs.FileSystem, folder: str) -> list[Trial]:
    """The trials in Ray Tune's newest snapshot in `folder`; empty if there is none, or it was cut by a kill."""
    try:
        return list(tune.ExperimentAnalysis(folder, storage_filesystem=filesystem).trials)
    except Exception as error:  # of a cut file: whatever JSON and pickle raise
        if is_outage(error):
            raise
        return []
