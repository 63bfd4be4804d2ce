"""Runs one trial of a sweep in the process that Ray Tune starts for it (`run_trial`), and reports its evaluations to Tune.

A trial is `train` with another configuration. It has the checkpoints, retries, journal and MLflow run of any training run,
and a restarted sweep finds it by its name.
"""

import io
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from orchestrator.ray_support.session import uses_fast_paths
from orchestrator.runs.identity import when_free
from orchestrator.runs.journal_access import read_records
from orchestrator.runs.records import MetricsRecord, Record
from orchestrator.sweeps.stages import BUDGET, LOCK_PATIENCE_S, SCORE, Stage, score_of
from orchestrator.training.run import train
from orchestrator.training.session import Stopwatch


class TuneReport(ray.train.UserCallback):
    """Reports every evaluation to Tune.

    Where the controller of the run is in the process of the trial, it reports directly, else through Ray's
    `TuneReportCallback`. Early stoppers compare trials at the `step` of the run, because Tune's own count starts again after
    a restart.
    """

    def __init__(self, rank_by: tuple[str, ...], *, steps: int, relayed: bool) -> None:
        self._rank_by, self._steps = rank_by, steps
        self._relay = TuneReportCallback() if relayed else None
        self.last: int | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Report rank 0's evaluation, except the last one: Tune would end the process before the run is complete."""
        if metrics[0]["step"] < self._steps:
            self.report(metrics[0], relay=self._relay)

    def report_all(self, records: Sequence[Record], *, first: int = 0, before: float = math.inf) -> None:
        """Report the evaluations among the records of a journal at steps from `first` and below `before`."""
        for record in records:
            if isinstance(record, MetricsRecord) and first <= record.step < before:
                self.report({**record.metrics, "step": record.step})

    def report(self, metrics: Mapping[str, Any], *, relay: TuneReportCallback | None = None) -> None:
        """Report `metrics` if they are an evaluation later than the last one. Raises SystemExit if Tune stops the trial."""
        score = score_of(metrics, self._rank_by)
        if score is not None and (self.last is None or metrics["step"] > self.last):
            self.last = int(metrics["step"])
            report = {SCORE: score, BUDGET: self.last, **{key: metrics[key] for key in self._rank_by}}
            if relay is not None:
                relay.after_report(None, [report], None)  # type: ignore[arg-type]  # it does not use the context
            else:
                ray.tune.report(report)


def run_trial(settings: dict[str, Any], *, stage: Stage, debug: bool) -> None:
    """Run or continue the trial of Tune's config `settings` to its end."""
    began = time.time()
    experiment = stage.experiment(stage.point_of(settings))
    watch = Stopwatch(began)
    relayed = not uses_fast_paths(experiment.scaling)
    report = TuneReport(stage.sweep.sweep.rank_by, steps=experiment.steps, relayed=relayed)
    report.report_all(read_records(experiment), before=experiment.steps)  # of before a restart
    console = Console(file=io.StringIO())  # the driver of the sweep shows the progress
    when_free(
        lambda: train(experiment, console=console, watch=watch, debug=debug, tags=stage.tags, callbacks=[report]),
        patience_s=LOCK_PATIENCE_S,
    )
    report.report_all(read_records(experiment), first=experiment.steps)  # the others were reported while it ran
