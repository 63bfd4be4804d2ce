"""`orchestrator sweep`: search with Ray Tune, rank by the frozen evaluation, compare the winner with the start at full length.

Every trial is a run of its own (see `trial`). What is Tune's own, the searcher's knowledge and which trials there are, lies
under `<storage>/<sweep>/search` and survives the driver; what the trials measured lies with them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.experiments.domains import Point
from orchestrator.experiments.sweep_spec import (
    SweepExperiment,
)
from orchestrator.ray_support.session import start_ray
from orchestrator.runs.identity import Run, claim_sweep
from orchestrator.storage.locks import hold
from orchestrator.sweeps.checks import check_sweep
from orchestrator.sweeps.comparison import Comparison, compare
from orchestrator.sweeps.leaderboard import Trial, leaderboard_rows, ranked
from orchestrator.sweeps.record import SweepRecord
from orchestrator.sweeps.stages import Stage, final_stage, search_stage
from orchestrator.sweeps.tuning import SweepError, SweepStoppedError, prepare_tune, tune_trials
from orchestrator.tracking.addresses import tracking_uri
from orchestrator.training import PRELOAD
from workloads.config import config_hash
from workloads.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """A finished sweep."""

    name: str
    run_id: str
    address: str
    trials: Sequence[Trial]  # best first
    comparison: Comparison | None
    report: str  # where table, figures and the best configuration are


def sweep_name(experiment: SweepExperiment) -> str:
    """The name asked for, else the experiment's name and the beginning of the whole request's hash."""
    return experiment.tracking.run_name or f"{experiment.name}-sweep-{_identity(experiment)[:8]}"


def _identity(experiment: SweepExperiment) -> str:
    return config_hash([experiment.science, experiment.sweep])


def sweep(experiment: SweepExperiment, *, console: Any, resume: bool = False, debug: bool = False) -> SweepOutcome:
    """Run the search to its end, or continue it.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        SweepError: no trial ended well, or it was told to stop.
        ComparisonError: a run at full length failed; resumed, it is tried again.
    """
    points = check_sweep(experiment)
    name = sweep_name(experiment)
    place = f"{experiment.storage.path.rstrip('/')}/{name}"
    with _alone(place, name):
        run = claim_sweep(experiment, name, identity=_identity(experiment), resume=resume)
        record = SweepRecord(experiment, run)
        prepare_tune(debug=debug)
        with ThreadPoolExecutor(1) as pool:
            connected = pool.submit(record.open)  # importing MLflow takes seconds: beside Ray's start
            start_ray(
                experiment,
                uri=tracking_uri(experiment),
                preload=PRELOAD,
                debug=debug,
                trials=_trials_at_once(experiment),
            )
            connected.result()
        try:
            outcome = _sweep(experiment, points, run, record, console=console, debug=debug)
        except (KeyboardInterrupt, SweepStoppedError):
            record.close("KILLED")
            raise
        except BaseException:
            record.close("FAILED")
            raise
        record.close("FINISHED")
        return outcome


@contextlib.contextmanager
def _alone(place: str, name: str) -> Iterator[None]:
    try:
        with hold(place, what=f"sweep {name!r}"):
            yield
    except DataError as error:
        raise ConfigError(f"storage.path: {error}") from None


def _trials_at_once(experiment: SweepExperiment) -> int:
    """How many trials an embedded Ray is made for."""
    scaling = experiment.scaling
    return experiment.sweep.max_concurrent or max(
        1, (os.cpu_count() or 1) // (scaling.most_workers * scaling.cpus_per_worker)
    )


def _sweep(
    experiment: SweepExperiment, points: list[Point] | None, run: Run, record: SweepRecord, *, console: Any, debug: bool
) -> SweepOutcome:
    search = search_stage(experiment, name=run.name, parent=record.run_id)
    trials = _search(search, points, run, record, console=console, debug=debug)
    best = next((trial for trial in trials if trial.score is not None and not trial.reason), None)
    if best is None:
        reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "nothing was measured"
        raise SweepError(f"sweep {run.name}: no trial of {len(trials)} has a score ({reasons})")
    comparison = None
    if experiment.sweep.final_seeds:
        comparison = _compare(experiment, best, run, record, console=console, debug=debug)
    report = record.report(search, trials, comparison)
    return SweepOutcome(
        name=run.name,
        run_id=record.run_id,
        address=record.address,
        trials=trials,
        comparison=comparison,
        report=report,
    )


def _search(
    stage: Stage, points: list[Point] | None, run: Run, record: SweepRecord, *, console: Any, debug: bool
) -> list[Trial]:
    trials = tune_trials(stage, points, run, folder="search", record=record, console=console, debug=debug)
    record.end_strays([trial.run_name for trial in trials])
    return ranked(trials)


def _compare(
    experiment: SweepExperiment, best: Trial, run: Run, record: SweepRecord, *, console: Any, debug: bool
) -> Comparison:
    stage = final_stage(experiment, name=run.name, parent=record.run_id)
    seeds = [experiment.seed + i for i in range(experiment.sweep.final_seeds)]
    winner, start = ([{**point, "seed": seed} for seed in seeds] for point in (best.point, stage.space.start()))
    points = winner if winner == start else [point for pair in zip(winner, start, strict=True) for point in pair]
    who = "the start, which won" if winner == start else "the winner and the start"
    console.print(f"at full length, {len(seeds)} seeds: {who}", highlight=False)
    runs = tune_trials(stage, points, run, folder="final", record=record, console=console, debug=debug)
    by_point = {json.dumps(trial.point, sort_keys=True): trial for trial in runs}
    sides = ([by_point[json.dumps(point, sort_keys=True)] for point in side] for side in (winner, start))
    return compare(stage, winner=next(sides), start=next(sides))


def show_sweep(outcome: SweepOutcome, *, console: Any) -> None:
    """The leaderboard, the comparison and where the rest is."""
    from rich.table import Table

    rows = leaderboard_rows(outcome.trials)
    knobs = [key for key in dict.fromkeys(key for trial in outcome.trials for key in trial.point)]
    columns = {"place": "", **{knob: knob.rpartition(".")[2] for knob in knobs}, "score": "score", "step": "step"}
    shown = Table(title=f"sweep {outcome.name}", title_justify="left")
    for title in (*columns.values(), "how it ended"):
        shown.add_column(title)
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns), row["outcome"])
    console.print(shown)
    for row in rows:
        if row["reason"]:
            console.print(f"{row['place']} failed: {row['reason']}", highlight=False, soft_wrap=True)
    for line in outcome.comparison.lines() if outcome.comparison else ():
        console.print(line, highlight=False, soft_wrap=True)
    for what, value in (("report", outcome.report), ("look", outcome.address), ("sweep", outcome.run_id)):
        console.print(f"{what:<7}  {value}", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
