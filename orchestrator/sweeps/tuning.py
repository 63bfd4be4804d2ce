"""The part of a sweep that Ray Tune does: which trials run, when one is stopped early, and what an earlier driver began."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from orchestrator.experiments.domains import Point
from orchestrator.experiments.sweep_spec import AshaConfig, MedianConfig, OptunaSearchConfig, SweepExperiment
from orchestrator.ray_support.errors import sentence
from orchestrator.runs.identity import Run, begun_run, finished_run
from orchestrator.runs.journal_access import read_records
from orchestrator.runs.records import FaultRecord, MetricsRecord, Record, TagsRecord
from orchestrator.sweeps.leaderboard import Trial
from orchestrator.sweeps.progress import Deadline, SweepProgress
from orchestrator.sweeps.record import SweepRecord
from orchestrator.sweeps.stages import BUDGET, POINT, SCORE, Stage, score_of
from orchestrator.sweeps.trial import run_trial
from workloads.errors import ConfigError, RunFailedError

_TUNE = {
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what Tune knows is at most so much older than its driver's death
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow keep the metrics
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # how long a stopped trial may take to clean up
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SweepError(RunFailedError):
    """The sweep ended without a result; the message says why."""


class SweepStoppedError(SweepError):
    """The sweep was told to stop before it had ended."""


def prepare_tune(*, debug: bool) -> None:
    """Tune's settings for this process, which it reads when it is first used."""
    os.environ.update({**_TUNE, "TUNE_PRINT_ALL_TRIAL_ERRORS": "1" if debug else "0"})


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
    with progress:
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


def _room(experiment: SweepExperiment) -> int:
    """How many trials the cluster has room for, at most as many as may run at the same time."""
    import ray

    scaling, have = experiment.scaling, ray.cluster_resources()
    room = int(have.get("CPU", 0) // (scaling.fewest_workers * scaling.cpus_per_worker))
    if scaling.use_gpu:
        room = min(room, int(have.get("GPU", 0) // scaling.fewest_workers))
    return max(1, min(room, experiment.sweep.max_concurrent or room))


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
    return OptunaSearch(space=stage.space, metric=SCORE, mode="max", points_to_evaluate=start, sampler=sampler)


def _stopper(stage: Stage) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    common: Any = {"time_attr": BUDGET, "metric": SCORE, "mode": "max"}
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
    stopper = _stopper(stage)
    for ended in tune.ExperimentAnalysis(where, storage_filesystem=run.filesystem).trials or []:
        if ended.status != "TERMINATED":  # what is resumed tells its evaluations again itself
            continue
        trial = trial_of(stage, stage.point_of(ended.config), reason=None, interrupted=False)
        stand_in: Any = _Past(trial.run_name)
        stopper.on_trial_add(None, stand_in)
        for step in sorted(trial.evaluations):
            report = {BUDGET: step, SCORE: trial.score_at(step), "training_iteration": step}
            stopper.on_trial_result(None, stand_in, report)
    return stopper


def trial_of(stage: Stage, point: Point, *, reason: str | None, interrupted: bool) -> Trial:
    """What is known of the trial at `point`, from its own record."""
    rank_by = stage.sweep.sweep.rank_by
    try:
        experiment = stage.experiment(point)
    except ConfigError as error:
        return Trial(point=point, experiment=None, run_name="", evaluations={}, rank_by=rank_by, reason=str(error))
    records = read_records(experiment)
    measured = [r for r in records if isinstance(r, MetricsRecord) and score_of(r.metrics, rank_by) is not None]
    run = begun_run(experiment)
    return Trial(
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
    """From the beginning of each attempt, which a record of tags marks, to its last record."""
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
