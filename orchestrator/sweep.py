"""`orchestrator sweep`: search with Ray Tune, rank by the frozen evaluation, compare the winner with the start at full length.

Every trial is a run of its own (see `trial`). What is Tune's own, the searcher's knowledge and which trials there are, lies
under `<storage>/<sweep>/search` and survives the driver; what the trials measured lies with them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.failures import sentence
from orchestrator.journal import Record
from orchestrator.leaderboard import Comparison, Trial, compare, leaderboard_rows, ranked
from orchestrator.locks import hold
from orchestrator.ray_session import start_ray
from orchestrator.runs import Run, begun_run, claim_sweep, finished_run
from orchestrator.search_space import Point
from orchestrator.spec import AshaConfig, GridSearchConfig, MedianConfig, OptunaSearchConfig, SweepExperiment
from orchestrator.sweep_record import SweepRecord
from orchestrator.track import tracking_uri
from orchestrator.train import check_request, recorded
from orchestrator.trial import POINT, Stage, run_trial, score_of
from workloads.config import ConfigError, config_hash, to_dict
from workloads.data.manifest import DataError, open_dataset

_TRIAL_DEFAULTS = {
    "evaluation.at_start": False,
    "tracking.log_model": False,
    "tracking.system_metrics": False,
}
"""What no trial needs; `sweep.trial` may say otherwise."""

_FIXED_SECTIONS = ("evaluation", "tracking", "storage", "failure", "scaling")
"""Sections that are not searched: the ruler must not change with what it measures, the rest does not change the result."""

_TUNE = {
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what Tune knows is at most so much older than its driver's death
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow keep the metrics
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # how long a stopped trial may take to clean up
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SweepError(RuntimeError):
    """The sweep ended without a result; the message says why."""


class SweepStoppedError(SweepError):
    """The sweep was told to stop before it had ended."""


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
    return config_hash([to_dict(experiment.science), to_dict(experiment.sweep)])


def sweep(experiment: SweepExperiment, *, console: Any, resume: bool = False, debug: bool = False) -> SweepOutcome:
    """Run the search to its end, or continue it.

    Raises:
        ConfigError, DataError, PlanError: the request cannot work; nothing was started.
        SweepError: no trial ended well, or it was told to stop.
        ComparisonError: a run at full length failed; resumed, it is tried again.
    """
    points = check_sweep(experiment)
    name = sweep_name(experiment)
    place = f"{experiment.storage.path.rstrip('/')}/{name}"
    with _alone(place, name):
        run = claim_sweep(experiment, name, identity=_identity(experiment), resume=resume)
        record = SweepRecord(experiment, run)
        os.environ.update({**_TUNE, "TUNE_PRINT_ALL_TRIAL_ERRORS": "1" if debug else "0"})
        with ThreadPoolExecutor(1) as pool:
            connected = pool.submit(record.open)  # importing MLflow takes seconds: beside Ray's start
            start_ray(experiment, uri=tracking_uri(experiment), debug=debug, trials=_trials_at_once(experiment))
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


def check_sweep(experiment: SweepExperiment) -> list[Point] | None:
    """Everything that can be known to fail before anything starts; the points, where the searcher knows them before.

    Raises:
        ConfigError, DataError, PlanError: with the key or path.
    """
    settings = experiment.sweep
    for key in settings.space:
        if key.partition(".")[0] in _FIXED_SECTIONS:
            raise ConfigError(f"sweep.space.{key}: the {key.partition('.')[0]} section is the same for all trials")
    held_out = experiment.evaluation.uri
    if settings.final_seeds and held_out is None:
        raise ConfigError("evaluation.uri: needed to measure the winner and the start; or set sweep.final_seeds=0")
    selection = open_dataset(settings.selection_uri).manifest.sha256
    if held_out is not None and open_dataset(held_out).manifest.sha256 == selection:
        raise ConfigError(
            "sweep.selection_uri: this is the held-out set; rank trials by images set aside from the training images "
            "(data build … val_share=0.02)"
        )
    if open_dataset(experiment.data.uri).manifest.sha256 == selection:
        raise ConfigError(
            "sweep.selection_uri: these are the training images; rank trials by images set aside from them"
        )
    stage = search_stage(experiment, name="check", parent=None)
    _check_trial(stage, settings.trial)
    for key, point in stage.space.probes():
        try:
            stage.experiment(point)
        except ConfigError as error:
            raise ConfigError(f"sweep.space.{key}: {error}") from None
    misplaced = stage.space.misplaced_start()
    if isinstance(settings.searcher, OptunaSearchConfig) and settings.include_start and misplaced:
        raise ConfigError(
            f"sweep.space.{misplaced}: the experiment's own value {stage.space.start()[misplaced]!r} is not in it; "
            "widen it or set sweep.include_start=false"
        )
    return listed_points(experiment)


def _check_trial(stage: Stage, fixed: Mapping[str, Any]) -> None:
    try:
        trial = stage.experiment({})
    except ConfigError as error:
        raise ConfigError(f"sweep.trial: {error}") from None
    check_request(trial)
    stopper = stage.sweep.sweep.stopper
    every = trial.evaluation.every_steps
    if isinstance(stopper, (AshaConfig, MedianConfig)) and (every is None or stopper.first_step < every):
        raise ConfigError(
            f"sweep.stopper.first_step: {stopper.first_step}, but a trial is first evaluated at step {every or trial.steps}; "
            "set sweep.trial.evaluation.every_steps"
        )
    clash = set(fixed) & set(stage.sweep.sweep.space)
    if clash:
        raise ConfigError(f"sweep.trial.{min(clash)}: this key is searched; fix it or search it")


def listed_points(experiment: SweepExperiment) -> list[Point] | None:
    """The points of a random or grid search, in order; None where they depend on results.

    Raises:
        ConfigError: a grid has more points than the trials allow.
    """
    settings = experiment.sweep
    space = search_stage(experiment, name="check", parent=None).space
    start = [space.start()] if settings.include_start else []
    if isinstance(settings.searcher, OptunaSearchConfig):
        return None
    if isinstance(settings.searcher, GridSearchConfig):
        points = start + [point for point in space.grid() if point not in start]
        if len(points) > settings.trials:
            raise ConfigError(
                f"sweep.trials: the grid has {len(points)} points, more than {settings.trials} trials; thin it or allow more"
            )
        return points
    return start + space.random(settings.trials - len(start), seed=settings.seed, known=start)


def search_stage(experiment: SweepExperiment, *, name: str, parent: str | None) -> Stage:
    """The short trials, ranked by the selection images."""
    fixed = {**_TRIAL_DEFAULTS, "evaluation.uri": experiment.sweep.selection_uri, **experiment.sweep.trial}
    return Stage(sweep=experiment, name=name, fixed=fixed, tags=_tags(name, "search", parent))


def final_stage(experiment: SweepExperiment, *, name: str, parent: str | None) -> Stage:
    """The winner and the start at full length, measured once on the held-out images."""
    fixed = {**_TRIAL_DEFAULTS, "tracking.log_model": True, "evaluation.every_steps": None}
    return Stage(sweep=experiment, name=name, fixed=fixed, tags=_tags(name, "final", parent))


def _tags(name: str, stage: str, parent: str | None) -> dict[str, str]:
    return {"sweep.name": name, "sweep.stage": stage} | ({"mlflow.parentRunId": parent} if parent else {})


def _trials_at_once(experiment: SweepExperiment) -> int:
    """How many trials an embedded Ray is made for."""
    scaling = experiment.scaling
    return experiment.sweep.max_concurrent or max(
        1, (os.cpu_count() or 1) // (scaling.most_workers * scaling.cpus_per_worker)
    )


def _room(experiment: SweepExperiment) -> int:
    """How many trials the cluster has room for, at most as many as may run at the same time."""
    import ray

    scaling, have = experiment.scaling, ray.cluster_resources()
    room = int(have.get("CPU", 0) // (scaling.fewest_workers * scaling.cpus_per_worker))
    if scaling.use_gpu:
        room = min(room, int(have.get("GPU", 0) // scaling.fewest_workers))
    return max(1, min(room, experiment.sweep.max_concurrent or room))


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


def trial_of(stage: Stage, point: Point, *, reason: str | None, interrupted: bool) -> Trial:
    """What is known of the trial at `point`, from its own record."""
    rank_by = stage.sweep.sweep.rank_by
    try:
        experiment = stage.experiment(point)
    except ConfigError as error:
        return Trial(point=point, experiment=None, run_name="", evaluations={}, rank_by=rank_by, reason=str(error))
    records = recorded(experiment)
    measured = [r for r in records if r["kind"] == "metrics" and score_of(r["metrics"], rank_by) is not None]
    run = begun_run(experiment)
    return Trial(
        point=point,
        experiment=experiment,
        run_name=experiment.tracking.run_name or "",
        evaluations={r["step"]: r["metrics"] for r in measured},
        rank_by=rank_by,
        reason=reason,
        interrupted=interrupted,
        ended=run is not None and finished_run(run) is not None,
        seconds=_seconds(records),
    )


def _seconds(records: Sequence[Record]) -> float:
    """From the beginning of each attempt, which a record of tags marks, to its last record."""
    total, began, last = 0.0, None, 0.0
    for record in records:
        if "time_ms" not in record:
            continue
        if record["kind"] == "tags":
            total += last - began if began is not None else 0.0
            began = last = record["time_ms"] / 1000
        else:
            last = max(last, record["time_ms"] / 1000)
    return total + (last - began if began is not None else 0.0)


def tune_trials(
    stage: Stage,
    points: list[Point] | None,
    run: Run,
    *,
    folder: str,
    record: SweepRecord,
    console: Any,
    debug: bool,
) -> list[Trial]:
    """Run the trials at `points`, or at those of the stage's searcher, on Ray Tune; what an earlier driver began is continued.

    Raises:
        SweepStoppedError: it was told to stop.
    """
    from ray import tune

    from orchestrator.sweep_progress import Deadline, SweepProgress

    # A trial's own process only waits for its workers. Tune wants it to hold something: a byte.
    holds = tune.PlacementGroupFactory([{"memory": 1}])
    trainable = tune.with_resources(tune.with_parameters(run_trial, stage=stage, debug=debug), holds)
    where = f"{run.folder}/{folder}"
    progress = SweepProgress(stage, console=console, total=len(points) if points else stage.sweep.sweep.trials)
    if tune.Tuner.can_restore(where, storage_filesystem=run.filesystem):
        tuner = tune.Tuner.restore(
            where,
            trainable,
            resume_unfinished=True,
            resume_errored=folder == "final",
            storage_filesystem=run.filesystem,
        )
        restored: Any = tuner._local_tuner
        restored._run_config.callbacks = [progress]  # the old driver's console is not ours
        if folder == "search":
            restored._tune_config.scheduler = _informed(stage, where, run)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={POINT: tune.grid_search(points)} if points is not None else None,
            tune_config=tune.TuneConfig(
                search_alg=None if points is not None else _optuna(stage),
                scheduler=_stopper(stage) if folder == "search" else None,
                num_samples=1 if points is not None else stage.sweep.sweep.trials,
                max_concurrent_trials=_room(stage.sweep),
                trial_dirname_creator=_dirname,
                reuse_actors=True,  # a trial's process has imported torch and MLflow
            ),
            run_config=tune.RunConfig(
                name=folder,
                storage_path=run.folder,
                storage_filesystem=run.filesystem,
                callbacks=[progress],
                stop=Deadline(hours=stage.sweep.sweep.hours, clock=record.clock) if folder == "search" else None,
                verbose=0,
            ),
        )
    found = tuner.fit()
    begun = found._experiment_analysis.trials  # a result knows its settings only if it reported anything
    errors = [found[i].error for i in range(len(found))]
    trials = [
        trial_of(
            stage,
            stage.point_of(one.config),
            reason=sentence(error) if error else None,
            interrupted=one.status not in ("TERMINATED", "ERROR"),
        )
        for one, error in zip(begun, errors, strict=True)
    ]
    for trial in trials:
        record.settle(trial, stage)
    if any(trial.outcome == "unfinished" for trial in trials):  # Tune takes Ctrl-C for a wish to end in good order
        raise SweepStoppedError(f"sweep {run.name}: stopped; --resume continues it")
    return trials


def _dirname(trial: Any) -> str:
    return str(trial.trial_id)


def _optuna(stage: Stage) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise ConfigError(
            "sweep.searcher.kind: optuna is not installed (pip install optuna); or use random or grid"
        ) from None
    settings = stage.sweep.sweep
    assert isinstance(settings.searcher, OptunaSearchConfig)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=settings.searcher.random_trials)
    start = [stage.space.encode(stage.space.start())] if settings.include_start else None
    return OptunaSearch(space=stage.space, metric="score", mode="max", points_to_evaluate=start, sampler=sampler)


def _stopper(stage: Stage) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    common: Any = {"time_attr": "step", "metric": "score", "mode": "max"}
    match stage.sweep.sweep.stopper:
        case AshaConfig() as asha:
            steps = stage.experiment({}).steps
            return ASHAScheduler(**common, max_t=steps, grace_period=asha.first_step, reduction_factor=asha.reduction)
        case MedianConfig() as median:
            return MedianStoppingRule(
                **common, grace_period=median.first_step, min_samples_required=median.least_trials
            )
        case _:
            return FIFOScheduler()


@dataclass(frozen=True)
class _Past:
    """A trial of an earlier driver, as a stopper sees it."""

    trial_id: str


def _informed(stage: Stage, where: str, run: Run) -> Any:
    """A stopper that knows the trials which ended under earlier drivers; Tune keeps what its searcher knows, not this."""
    from ray import tune

    stopper = _stopper(stage)
    for ended in tune.ExperimentAnalysis(where, storage_filesystem=run.filesystem).trials or []:
        if ended.status != "TERMINATED":  # what is resumed tells its evaluations again itself
            continue
        trial = trial_of(stage, stage.point_of(ended.config), reason=None, interrupted=False)
        stand_in: Any = _Past(trial.run_name)
        stopper.on_trial_add(None, stand_in)
        for step in sorted(trial.evaluations):
            report = {"step": step, "score": trial.score_at(step), "training_iteration": step}
            stopper.on_trial_result(None, stand_in, report)
    return stopper


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
