"""One trial of a sweep: a whole run of its own, in a process that Ray Tune starts, with every evaluation told to Tune.

A trial is `train` with another configuration. So it has the run's checkpoints, retries, journal and record, and is
continued, or known to have ended, by its name.
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
from orchestrator.sweeps.stages import BUDGET, LET_GO_S, SCORE, Stage, score_of
from orchestrator.training.run import train
from orchestrator.training.session import Stopwatch


class TuneReport(ray.train.UserCallback):
    """Reports every evaluation to Tune: directly where the run's controller is in the trial's process, else through Ray's
    `TuneReportCallback`.

    Tune's early stoppers count by `step`, the run's own, which goes on after a restart where Tune's would begin again.
    """

    def __init__(self, rank_by: tuple[str, ...], *, steps: int, relayed: bool) -> None:
        self._rank_by, self._steps = rank_by, steps
        self._relay = TuneReportCallback() if relayed else None
        self.last: int | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass rank 0's evaluation on; the last one only when the run is complete, since Tune then ends the process."""
        if metrics[0]["step"] < self._steps:
            self.tell(metrics[0], relay=self._relay)

    def tell_all(self, records: Sequence[Record], *, first: int = 0, before: float = math.inf) -> None:
        """Report the evaluations among a journal's records, those at steps from `first` and below `before`."""
        for record in records:
            if isinstance(record, MetricsRecord) and first <= record.step < before:
                self.tell({**record.metrics, "step": record.step})

    def tell(self, figures: Mapping[str, Any], *, relay: TuneReportCallback | None = None) -> None:
        """Report `figures` if they are an evaluation later than the last; ends the process's work if Tune says stop."""
        score = score_of(figures, self._rank_by)
        if score is not None and (self.last is None or figures["step"] > self.last):
            self.last = int(figures["step"])
            named = {key: figures[key] for key in self._rank_by}
            reported = {SCORE: score, BUDGET: self.last, **named}
            if relay is not None:
                relay.after_report(None, [reported], None)  # type: ignore[arg-type]  # it does not use the context
            else:
                ray.tune.report(reported)


def run_trial(settings: dict[str, Any], *, stage: Stage, debug: bool) -> None:
    """What Tune runs for each trial."""
    began = time.time()
    experiment = stage.experiment(stage.point_of(settings))
    watch = Stopwatch(began)
    relayed = not uses_fast_paths(experiment.scaling)
    report = TuneReport(stage.sweep.sweep.rank_by, steps=experiment.steps, relayed=relayed)
    report.tell_all(read_records(experiment), before=experiment.steps)  # what this run measured before a restart
    console = Console(file=io.StringIO())  # the sweep's driver says how it goes
    when_free(
        lambda: train(experiment, console=console, watch=watch, debug=debug, tags=stage.tags, callbacks=[report]),
        patience_s=LET_GO_S,
    )
    report.tell_all(read_records(experiment), first=experiment.steps)  # the others were reported while it ran
