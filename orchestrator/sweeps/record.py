"""`SweepRecord`: a sweep in MLflow, as a parent run with the report, and the runs of its trials below it."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.fs as arrow_fs

from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.runs.identity import Run, RunHeldError, when_free
from orchestrator.runs.records import MetricsRecord, TagsRecord
from orchestrator.sweeps.comparison import Comparison
from orchestrator.sweeps.leaderboard import common_step, importance, leaderboard_rows, to_csv
from orchestrator.sweeps.stages import LOCK_PATIENCE_S, Stage
from orchestrator.sweeps.stopping import SweepClock
from orchestrator.sweeps.trial_result import TrialResult
from orchestrator.tracking.abandoned import close_abandoned_run
from orchestrator.tracking.addresses import artifact_root, page_address, tracking_uri, without_secrets
from orchestrator.tracking.header import RunHeader, header_of, prefixed
from orchestrator.tracking.parent_run import ParentRun
from orchestrator.tracking.sink import MlflowSink
from workloads.config import config_hash, flatten, to_dict, to_yaml
from workloads.reports.sweeps import draw_effects, draw_parallel_coordinates

logger = logging.getLogger(__name__)


class SweepRecord:
    """The parent run of a sweep, and the clock of its time limit."""

    def __init__(self, experiment: SweepExperiment, run: Run) -> None:
        self._experiment, self._run = experiment, run
        self._uri = tracking_uri(experiment)
        self._sink = MlflowSink(
            _header_of(experiment, run),
            uri=self._uri,
            artifact_root=artifact_root(experiment),
            filesystem=run.filesystem,
            run_folder=run.folder,
        )
        self._parent = ParentRun(self._sink)
        self._page = ""
        self.clock = SweepClock(run.filesystem, f"{run.folder}/hours")

    def open(self) -> None:
        """Create the parent run, or open that of an earlier driver, and a table of its trials with the searched keys."""
        self._sink.open()
        sweep = self._experiment.sweep
        knobs = [f"params.`{key}`" for key in sweep.space]
        scores = [f"metrics.`{key}`" for key in sweep.rank_by]
        self._page = self._parent.share_view(
            self._run.claim,
            columns=[*knobs, *scores, "tags.`sweep.stage`"],
            order_by=scores[0],
            query=f"tags.`sweep.name` = '{self._run.name}'",
        )

    @property
    def run_id(self) -> str:
        """The parent run's id."""
        return self._sink.open()

    @property
    def address(self) -> str:
        """Address of the table of the trials."""
        return page_address(self._uri, self._page)

    def close_trial(self, trial: TrialResult, stage: Stage) -> None:
        """End the MLflow run of a trial that Tune has ended: FINISHED if it was stopped early, FAILED or KILLED."""
        tags = {**stage.tags, "sweep.outcome": trial.outcome} | ({"run.failure": trial.reason} if trial.reason else {})
        if trial.experiment is None:
            self._add_refused(trial, tags)
            return
        if trial.ended:
            return
        status = "FAILED" if trial.reason else "KILLED" if trial.outcome == "unfinished" else "FINISHED"
        experiment = trial.experiment
        try:  # the process of a stopped trial keeps its lock until it ends
            closed = when_free(
                lambda: close_abandoned_run(experiment, status=status, tags=tags), patience_s=LOCK_PATIENCE_S
            )
        except RunHeldError:
            logger.warning("run %s is still locked by its process; its MLflow run stays open", trial.run_name)
            return
        if closed is None and trial.reason:
            self._add_refused(trial, tags)

    def _add_refused(self, trial: TrialResult, tags: Mapping[str, str]) -> None:
        """Add a FAILED run for a trial that never started, with the reason."""
        params = {key: str(value) for key, value in trial.point.items()}
        digest = config_hash(trial.point)[:8]
        self._parent.add_child(name=f"{self._run.name}-refused-{digest}", params=params, tags=tags, status="FAILED")

    def kill_unknown_trials(self, known: Sequence[str]) -> None:
        """Mark as KILLED the running trials with other names: a driver that died had started them after Tune's snapshot."""
        self._parent.kill_children(except_names=known)

    def report(self, stage: Stage, trials: Sequence[TrialResult], comparison: Comparison | None) -> str:
        """Log leaderboard, figures and the best configuration; returns their location in the storage of the sweep.

        Args:
            trials: best first.
        """
        weights = importance(trials, list(stage.sweep.sweep.space), seed=stage.sweep.sweep.seed)
        with tempfile.TemporaryDirectory() as folder:
            self._write_report(Path(folder), stage, trials, weights, comparison)
            self._sink.log_folder(Path(folder), "report")
            location = f"{self._run.folder}/report"
            self._run.filesystem.create_dir(location, recursive=True)
            arrow_fs.copy_files(
                folder,
                location,
                source_filesystem=arrow_fs.LocalFileSystem(),
                destination_filesystem=self._run.filesystem,
            )
        metrics = _metrics_of(trials, weights, comparison)
        tags = {"sweep.best_run": trials[0].run_name} | self._winner(comparison)
        now = int(1000 * time.time())
        self._sink.write([MetricsRecord(step=0, time_ms=now, metrics=metrics), TagsRecord(tags=tags, time_ms=now)])
        return f"{self._experiment.storage.path.rstrip('/')}/{self._run.name}/report"

    def _write_report(
        self,
        folder: Path,
        stage: Stage,
        trials: Sequence[TrialResult],
        weights: Mapping[str, float],
        comparison: Comparison | None,
    ) -> None:
        knobs = list(stage.sweep.sweep.space)
        (folder / "leaderboard.csv").write_text(to_csv(leaderboard_rows(trials)), encoding="utf-8")
        step = common_step(trials)
        points = [(trial.point, score) for trial in trials if (score := trial.score_at(step)) is not None]
        title = f"score at step {step} = mean of {', '.join(stage.sweep.sweep.rank_by)}"
        draw_parallel_coordinates(points, knobs, folder / "parallel_coordinates.png", title=title)
        draw_effects(points, knobs, weights, folder / "effects.png", title=title)
        (folder / "best.yaml").write_text(self._best_yaml(trials[0], comparison), encoding="utf-8")

    def _winner(self, comparison: Comparison | None) -> dict[str, str]:
        if comparison is None:
            return {}
        # The run of the first seed. To take the better one would be a choice on the held-out images.
        return {
            "sweep.winner_run": comparison.winner[0].run_name,
            "sweep.better_than_start": str(comparison.better).lower(),
        }

    def _best_yaml(self, best: TrialResult, comparison: Comparison | None) -> str:
        """The experiment of the sweep with the best trial's values, at full length, ready for `orchestrator train`."""
        name = f"{self._experiment.name}-best"[:100]
        stage = Stage(kind="final", sweep=self._experiment, name=self._run.name, fixed={"name": name}, tags={})
        values = to_dict(stage.experiment(best.point))
        values["tracking"]["run_name"] = None
        comments = [
            f"Best configuration of sweep {self._run.name}: {best.point}",
            f"Command: orchestrator train {name}.yaml",
            f"Score in the sweep: {best.score or 0.0:.3f} after {best.step} steps on the selection images",
            *([] if comparison is None else comparison.lines()),
        ]
        return without_secrets("".join(f"# {line}\n" for line in comments) + to_yaml(values))

    def close(self, status: str) -> None:
        """End the parent run."""
        with contextlib.suppress(Exception):
            self._sink.close(status)


def _metrics_of(
    trials: Sequence[TrialResult], weights: Mapping[str, float], comparison: Comparison | None
) -> dict[str, float]:
    best = trials[0]
    metrics = {
        "sweep/trials": len(trials),
        "sweep/failed": sum(trial.outcome == "failed" for trial in trials),
        "sweep/stopped_early": sum(trial.outcome == "stopped early" for trial in trials),
        "sweep/trial_steps": sum(trial.step for trial in trials),
        "sweep/trial_hours": sum(trial.seconds for trial in trials) / 3600,
        **{f"sweep/importance/{knob}": share for knob, share in weights.items()},
    }
    if best.score is not None:
        metrics |= {"sweep/score": best.score, **{key: best.evaluations[best.step][key] for key in best.rank_by}}
    for name, suite in comparison.suites.items() if comparison is not None else ():
        values = {"difference": suite.difference, "low": suite.low, "high": suite.high}
        metrics |= {f"sweep/final/{name}/{what}": value for what, value in values.items()}
    return metrics


def _header_of(experiment: SweepExperiment, run: Run) -> RunHeader:
    return header_of(
        run.name,
        experiment,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        command=f"sweep {experiment.name}",
        config_sha256=run.config_sha256,
        manifest_sha256=run.manifest_sha256,
        params={**flatten(experiment.science), **prefixed("sweep", flatten(experiment.sweep))},
        tags={"sweep.name": run.name, "sweep.stage": "sweep"},
        datasets=[],
    )
