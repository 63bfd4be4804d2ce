"""Runs `orchestrator sweep` (`sweep`): searches with Ray Tune, ranks the trials, and compares the winner with the baseline.

The baseline is the experiment's own configuration. Every trial is a training run with its own folder (see `trial_process`).
Tune's state, which trials there are and what the searcher knows, lies under `<storage>/<sweep>/search` and `…/final`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.experiments.domains import Point
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.ray_support.session import start_ray
from orchestrator.runs.identity import Run, claim_sweep
from orchestrator.storage.lock import Lock
from orchestrator.storage.locks import hold
from orchestrator.sweeps.checks import check_sweep
from orchestrator.sweeps.comparison import Comparison, compare
from orchestrator.sweeps.leaderboard import leaderboard_rows, ranked
from orchestrator.sweeps.record import SweepRecord
from orchestrator.sweeps.stages import final_stage, search_stage
from orchestrator.sweeps.trial_result import TrialResult
from orchestrator.sweeps.tuning import SweepError, SweepStoppedError, prepare_tune, tune_trials
from orchestrator.tracking.addresses import tracking_uri, without_secrets
from orchestrator.training import PRELOAD
from workloads.config import config_hash
from workloads.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """A finished sweep."""

    name: str
    run_id: str
    address: str
    trials: Sequence[TrialResult]  # best first
    comparison: Comparison | None
    report: str  # folder or URI of the table, the figures and the best configuration


def sweep_name(experiment: SweepExperiment) -> str:
    """`tracking.run_name`, else the name of the experiment and the beginning of the hash of experiment and sweep."""
    return experiment.tracking.run_name or f"{experiment.name}-sweep-{_identity(experiment)[:8]}"


def _identity(experiment: SweepExperiment) -> str:
    return config_hash([experiment.science, experiment.sweep])


def sweep(experiment: SweepExperiment, *, console: Console, resume: bool = False, debug: bool = False) -> SweepOutcome:
    """Run a sweep to its end; with `resume`, continue it if it was begun before.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        SweepError: no trial has a score, or the sweep was stopped on request.
        ComparisonError: a final run failed; `resume` tries it again.
        LockLostError: another driver took the sweep over.
    """
    points = check_sweep(experiment)
    experiment = _with_address_in_environment(experiment)
    name = sweep_name(experiment)
    with _alone(f"{experiment.storage.path.rstrip('/')}/{name}", name) as lock:
        run = claim_sweep(experiment, name, identity=_identity(experiment), resume=resume)
        record = SweepRecord(experiment, run)
        prepare_tune(debug=debug)
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(record.open)  # importing MLflow takes seconds, as does Ray's start
            start_ray(
                experiment,
                uri=tracking_uri(experiment),
                preload=PRELOAD,
                debug=debug,
                trials=_local_trials(experiment),
            )
            opened.result()
        lock.on_lost(lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            with _sigterm_as_interrupt():
                outcome = _search_and_compare(experiment, points, run, record, console=console, debug=debug)
        except BaseException as error:
            if lock.lost:
                lock.check()  # raises: the sweep's record belongs to the driver that has the lock now
            record.close("KILLED" if isinstance(error, (KeyboardInterrupt, SweepStoppedError)) else "FAILED")
            raise
        lock.check()
        record.close("FINISHED")
        return outcome


def _with_address_in_environment(experiment: SweepExperiment) -> SweepExperiment:
    """Move a tracking address with a password to MLFLOW_TRACKING_URI: Tune pickles the experiment into the sweep's storage."""
    uri = experiment.tracking.uri
    if uri is None or uri == without_secrets(uri):
        return experiment
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return dataclasses.replace(experiment, tracking=dataclasses.replace(experiment.tracking, uri=None))


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, on which Tune stores its state and stops the trials."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _alone(uri: str, name: str) -> Iterator[Lock]:
    """Keep other drivers out of the sweep while the context lasts."""
    try:
        with hold(uri, what=f"sweep {name!r}") as lock:
            yield lock
    except DataError as error:
        raise ConfigError(f"storage.path: {error}") from None


def _local_trials(experiment: SweepExperiment) -> int:
    """How many trials at a time a local Ray is started for."""
    scaling = experiment.scaling
    return experiment.sweep.max_concurrent or max(
        1, (os.cpu_count() or 1) // (scaling.most_workers * scaling.cpus_per_worker)
    )


def _search_and_compare(
    experiment: SweepExperiment,
    points: list[Point] | None,
    run: Run,
    record: SweepRecord,
    *,
    console: Console,
    debug: bool,
) -> SweepOutcome:
    search = search_stage(experiment, name=run.name, parent=record.run_id)
    trials = ranked(tune_trials(search, points, run, record=record, debug=debug))
    record.kill_unknown_trials([trial.run_name for trial in trials])
    best = next((trial for trial in trials if trial.score is not None and not trial.reason), None)
    if best is None:
        reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "nothing was measured"
        raise SweepError(f"sweep {run.name}: none of {len(trials)} trials has a score ({reasons})")
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


def _compare(
    experiment: SweepExperiment, best: TrialResult, run: Run, record: SweepRecord, *, console: Console, debug: bool
) -> Comparison:
    stage = final_stage(experiment, name=run.name, parent=record.run_id)
    seeds = [experiment.seed + i for i in range(experiment.sweep.final_seeds)]
    winner, baseline = ([{**point, "seed": seed} for seed in seeds] for point in (best.point, stage.space.baseline()))
    points = winner if winner == baseline else [point for pair in zip(winner, baseline, strict=True) for point in pair]
    who = "the baseline configuration, which won" if winner == baseline else "winner and baseline configuration"
    console.print(f"final runs at full length, {len(seeds)} seeds: {who}", highlight=False)
    runs = tune_trials(stage, points, run, record=record, debug=debug)
    by_point = {json.dumps(trial.point, sort_keys=True): trial for trial in runs}
    of_winner, of_baseline = (
        [by_point[json.dumps(point, sort_keys=True)] for point in side] for side in (winner, baseline)
    )
    return compare(stage, winner=of_winner, baseline=of_baseline)


def show_sweep(outcome: SweepOutcome, *, console: Console) -> None:
    """Print the leaderboard, the comparison, and the locations of report and MLflow run."""
    rows = leaderboard_rows(outcome.trials)
    knobs = list(dict.fromkeys(key for trial in outcome.trials for key in trial.point))
    columns = {"place": "", **{knob: knob.rpartition(".")[2] for knob in knobs}, "score": "score", "step": "step"}
    table = Table(title=f"sweep {outcome.name}", title_justify="left")
    for title in (*columns.values(), "outcome"):
        table.add_column(title)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns), row["outcome"])
    console.print(table)
    for row in rows:
        if row["reason"]:
            console.print(f"{row['place']} failed: {row['reason']}", highlight=False, soft_wrap=True)
    for line in outcome.comparison.lines() if outcome.comparison else ():
        console.print(line, highlight=False, soft_wrap=True)
    for what, value in (("report", outcome.report), ("page", outcome.address), ("sweep", outcome.run_id)):
        console.print(f"{what:<7}  {value}", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
