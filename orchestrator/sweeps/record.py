"""A sweep's record in MLflow: one parent run, the trials' runs below it, and the report."""

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
from orchestrator.sweeps.leaderboard import Trial, common_step, importance, leaderboard_rows, to_csv
from orchestrator.sweeps.progress import Clock
from orchestrator.sweeps.stages import LET_GO_S, Stage
from orchestrator.tracking.abandoned import close_abandoned_run
from orchestrator.tracking.addresses import artifact_root, page_address, tracking_uri, without_secrets
from orchestrator.tracking.header import RunHeader, header_of, prefixed
from orchestrator.tracking.parent_run import ParentRun
from orchestrator.tracking.sink import MlflowSink
from workloads.config import config_hash, flatten, to_dict, to_yaml
from workloads.reports.sweeps import draw_effects, draw_parallel_coordinates

logger = logging.getLogger(__name__)


class SweepRecord:
    """The parent run of a sweep."""

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
        self.clock = Clock(run.filesystem, f"{run.folder}/hours")

    def open(self) -> None:
        """Make the parent run, or find it again, and the view of its trials with the columns that matter."""
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
        """Where people look at the sweep: the table of its trials."""
        return page_address(self._uri, self._page)

    def settle(self, trial: Trial, stage: Stage) -> None:
        """Give a trial's run its true end: a stopped one was finished by the sweep, a failed one failed.

        A stopped trial's process takes a moment to die, and holds its run until then.
        """
        tags = {**stage.tags, "sweep.outcome": trial.outcome} | ({"run.failure": trial.reason} if trial.reason else {})
        if trial.experiment is None:
            self._record_refused(trial, tags)
            return
        if trial.ended:
            return
        status = "FAILED" if trial.reason else "KILLED" if trial.outcome == "unfinished" else "FINISHED"
        experiment = trial.experiment
        try:
            settled = when_free(lambda: close_abandoned_run(experiment, status=status, tags=tags), patience_s=LET_GO_S)
        except RunHeldError:
            logger.warning("run %s is still held by its process; its record stays open", trial.run_name)
            return
        if settled is None and trial.reason:
            self._record_refused(trial, tags)

    def _record_refused(self, trial: Trial, tags: Mapping[str, str]) -> None:
        """A run for a trial that never began, so that people see it and why."""
        params = {key: str(value) for key, value in trial.point.items()}
        digest = config_hash(trial.point)[:8]
        self._parent.add_child(name=f"{self._run.name}-refused-{digest}", params=params, tags=tags, status="FAILED")

    def end_strays(self, known: Sequence[str]) -> None:
        """Mark the trials as KILLED that a dead driver began and Tune does not know of."""
        self._parent.kill_children(except_names=known)

    def report(self, stage: Stage, trials: Sequence[Trial], comparison: Comparison | None) -> str:
        """Log the leaderboard, the figures and the best configuration; returns where they are in the sweep's storage."""
        with tempfile.TemporaryDirectory() as folder:
            return self._report(Path(folder), stage, trials, comparison)

    def _report(self, folder: Path, stage: Stage, trials: Sequence[Trial], comparison: Comparison | None) -> str:
        knobs = list(stage.sweep.sweep.space)
        (folder / "leaderboard.csv").write_text(to_csv(leaderboard_rows(trials)), encoding="utf-8")
        weights = importance(trials, knobs, seed=stage.sweep.sweep.seed)
        step = common_step(trials)
        points = [(trial.point, score) for trial in trials if (score := trial.score_at(step)) is not None]
        title = f"score at step {step} = mean of {', '.join(stage.sweep.sweep.rank_by)}"
        draw_parallel_coordinates(points, knobs, folder / "parallel_coordinates.png", title=title)
        draw_effects(points, knobs, weights, folder / "effects.png", title=title)
        best = trials[0]
        (folder / "best.yaml").write_text(self._best_yaml(best, comparison), encoding="utf-8")
        self._sink.log_folder(folder, "report")
        hours = sum(trial.seconds for trial in trials) / 3600
        figures = {
            "sweep/trials": len(trials),
            "sweep/failed": sum(trial.outcome == "failed" for trial in trials),
            "sweep/stopped_early": sum(trial.outcome == "stopped early" for trial in trials),
            "sweep/trial_steps": sum(trial.step for trial in trials),
            "sweep/trial_hours": hours,
            **{f"sweep/importance/{knob}": share for knob, share in weights.items()},
        }
        if best.score is not None:
            figures |= {"sweep/score": best.score, **{k: best.evaluations[best.step][k] for k in best.rank_by}}
        if comparison is not None:
            for name, suite in comparison.suites.items():
                figures |= {
                    f"sweep/final/{name}/{what}": getattr(suite, what) for what in ("difference", "low", "high")
                }
        place = f"{self._run.folder}/report"
        self._run.filesystem.create_dir(place, recursive=True)
        arrow_fs.copy_files(
            str(folder),
            place,
            source_filesystem=arrow_fs.LocalFileSystem(),
            destination_filesystem=self._run.filesystem,
        )
        tags = {"sweep.best_run": best.run_name} | self._winner(comparison)
        now = int(1000 * time.time())
        self._sink.write([MetricsRecord(step=0, time_ms=now, metrics=figures), TagsRecord(tags=tags, time_ms=now)])
        return f"{self._experiment.storage.path.rstrip('/')}/{self._run.name}/report"

    def _winner(self, comparison: Comparison | None) -> dict[str, str]:
        if comparison is None:
            return {}
        # The first seed, not the better one: that would be a choice by the held-out images.
        return {
            "sweep.winner_run": comparison.winner[0].run_name,
            "sweep.better_than_start": str(comparison.better).lower(),
        }

    def _best_yaml(self, best: Trial, comparison: Comparison | None) -> str:
        """The winner as a ready experiment: the sweep's own experiment with the winner's values, at full length."""
        name = f"{self._experiment.name}-best"[:100]
        winner = Stage(sweep=self._experiment, name=self._run.name, fixed={"name": name}, tags={}).experiment(
            best.point
        )
        values = to_dict(winner)
        values["tracking"]["run_name"] = None
        told = [
            f"Found by sweep {self._run.name}: {best.point}",
            f"Command: orchestrator train {name}.yaml",
            f"Score in the sweep: {best.score or 0.0:.3f} after {best.step} steps on the selection images",
            *([] if comparison is None else comparison.lines()),
        ]
        return without_secrets("".join(f"# {line}\n" for line in told) + to_yaml(values))

    def close(self, status: str) -> None:
        """End the parent run."""
        with contextlib.suppress(Exception):
            self._sink.close(status)


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
