"""Runs the trials of one stage on Ray Tune (`tune_trials`): a new search, or one that an earlier driver left.

Tune decides which trials run; what they measure lies in their own runs. So a stage whose Tune state cannot be read is
started again, and its trials, which are found by their names, report what they have.
"""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as arrow_fs
import ray
from ray import tune

from orchestrator.experiments.domains import Point
from orchestrator.experiments.sweep_spec import OptunaSearchConfig, SweepExperiment
from orchestrator.ray_support.errors import sentence
from orchestrator.runs.identity import Run
from orchestrator.sweeps.progress import SweepProgress
from orchestrator.sweeps.record import SweepRecord
from orchestrator.sweeps.stages import POINT, SCORE, Stage
from orchestrator.sweeps.stopping import Deadline, EarlierTrials, make_scheduler
from orchestrator.sweeps.trial_process import run_trial
from orchestrator.sweeps.trial_result import TrialResult, read_result, snapshot_trials
from workloads.errors import ConfigError, RunFailedError
from workloads.storage.filesystems import is_outage, read_bytes

if TYPE_CHECKING:
    from ray.tune.experiment import Trial
    from ray.tune.search.optuna import OptunaSearch

logger = logging.getLogger(__name__)

_TUNE = {
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # Tune's snapshot is at most this much older than its driver's death
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow store the metrics
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # how long a stopped trial may take to clean up
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SweepError(RunFailedError):
    """The sweep ended without a result; the message says why."""


class SweepStoppedError(SweepError):
    """The sweep was stopped on request before its end."""


def prepare_tune(*, debug: bool) -> None:
    """Set Tune's environment variables for this process, which it reads when it is first used."""
    os.environ.update({**_TUNE, "TUNE_PRINT_ALL_TRIAL_ERRORS": "1" if debug else "0"})
    if not debug:
        logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it repeats which trials failed


def tune_trials(
    stage: Stage, points: list[Point] | None, run: Run, *, record: SweepRecord, debug: bool
) -> list[TrialResult]:
    """Run the trials at `points`, or, if None, at those that the stage's searcher chooses; resumes what a driver left.

    Raises:
        SweepStoppedError: a trial is unfinished, because the sweep was stopped on request.
    """
    tuner = restored(stage, run, debug=debug) or _fresh(stage, points, run, record=record, debug=debug)
    results = _results(stage, run, tuner.fit())
    for result in results:
        record.close_trial(result, stage)
    if any(result.outcome == "unfinished" for result in results):  # Tune returns normally after Ctrl-C
        raise SweepStoppedError(f"sweep {run.name}: stopped; --resume continues it")
    return results


def _folder(stage: Stage, run: Run) -> str:
    return f"{run.folder}/{stage.kind}"


def _trainable(stage: Stage, *, debug: bool) -> Any:
    # The process of a trial only waits for its workers. Tune requires a resource: one byte.
    resources = tune.PlacementGroupFactory([{"memory": 1}])
    return tune.with_resources(tune.with_parameters(run_trial, stage=stage, debug=debug), resources)


def restored(stage: Stage, run: Run, *, debug: bool) -> tune.Tuner | None:
    """The tuner that an earlier driver left; None if there is none, or its state was cut by a kill."""
    folder, filesystem = _folder(stage, run), run.filesystem
    if not tune.Tuner.can_restore(folder, storage_filesystem=filesystem):
        return None
    try:
        if _is_complete(filesystem, folder) and snapshot_trials(filesystem, folder):
            return tune.Tuner.restore(
                folder,
                _trainable(stage, debug=debug),
                resume_unfinished=True,
                resume_errored=stage.kind == "final",
                storage_filesystem=filesystem,
            )
    except OSError as error:
        if is_outage(error):
            raise SweepError(
                f"{folder}: Ray Tune's state cannot be read now ({sentence(error)}); --resume continues it"
            ) from error
        logger.debug("%s: cannot be restored", folder, exc_info=True)
    except Exception:  # whatever a pickle of classes that have moved raises
        logger.debug("%s: cannot be restored", folder, exc_info=True)
    logger.warning("%s: the state of Ray Tune cannot be read; its trials are continued by their names", folder)
    filesystem.delete_dir(folder)
    return None


def _is_complete(filesystem: arrow_fs.FileSystem, folder: str) -> bool:
    """Whether no file of Tune's state was cut by a kill: Tune overwrites them in place."""
    for info in filesystem.get_file_info(arrow_fs.FileSelector(folder)):
        if info.extension not in ("json", "pkl"):
            continue
        data = read_bytes(filesystem, info.path)
        if data.startswith(pickle.PROTO):  # of a searcher, whatever the name says
            if not data.endswith(pickle.STOP):
                return False
            continue
        try:
            json.loads(data)
        except ValueError:
            return False
    return True


def _fresh(stage: Stage, points: list[Point] | None, run: Run, *, record: SweepRecord, debug: bool) -> tune.Tuner:
    settings = stage.sweep.sweep
    is_search = stage.kind == "search"
    earlier = EarlierTrials(stage=stage, filesystem=run.filesystem, folder=_folder(stage, run))
    return tune.Tuner(
        _trainable(stage, debug=debug),
        param_space={POINT: tune.grid_search(points)} if points is not None else None,
        tune_config=tune.TuneConfig(
            search_alg=None if points is not None else make_optuna(stage),
            scheduler=make_scheduler(earlier) if is_search else None,
            num_samples=1 if points is not None else settings.trials,
            max_concurrent_trials=_trials_at_once(stage.sweep),
            trial_dirname_creator=_folder_of_trial,
            reuse_actors=True,  # the process of a trial has imported torch and MLflow
        ),
        run_config=tune.RunConfig(
            name=stage.kind,
            storage_path=run.folder,
            storage_filesystem=run.filesystem,
            callbacks=[SweepProgress(stage, total=len(points) if points is not None else settings.trials)],
            stop=Deadline(hours=settings.hours, clock=record.clock) if is_search else None,
            verbose=0,
        ),
    )


def _results(stage: Stage, run: Run, grid: tune.ResultGrid) -> list[TrialResult]:
    # The grid knows the settings of those trials only that reported; the snapshot has all, but not their errors.
    errors = {Path(grid[i].path).name: grid[i].error for i in range(len(grid))}
    results = []
    for trial in snapshot_trials(run.filesystem, _folder(stage, run)):
        error = errors.get(_folder_of_trial(trial))
        results.append(
            read_result(
                stage,
                stage.point_of(trial.config),
                reason=sentence(error) if error else None,
                interrupted=trial.status not in (trial.TERMINATED, trial.ERROR),
            )
        )
    if len(results) < len(errors):
        raise SweepError(f"sweep {run.name}: {_folder(stage, run)} cannot be read or written; --resume continues it")
    return results


def _trials_at_once(experiment: SweepExperiment) -> int:
    """How many trials the cluster has room for, at most `sweep.max_concurrent`."""
    scaling, resources = experiment.scaling, ray.cluster_resources()
    room = int(resources.get("CPU", 0) // (scaling.fewest_workers * scaling.cpus_per_worker))
    if scaling.use_gpu:
        room = min(room, int(resources.get("GPU", 0) // scaling.fewest_workers))
    return max(1, min(room, experiment.sweep.max_concurrent or room))


def _folder_of_trial(trial: "Trial") -> str:
    return str(trial.trial_id)


def make_optuna(stage: Stage) -> "OptunaSearch":
    """Optuna's sampler over the space of the stage.

    Raises:
        ConfigError: Optuna is not installed.
    """
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
    baseline = [stage.space.encode(stage.space.baseline())] if settings.include_start else None
    return OptunaSearch(space=stage.space, metric=SCORE, mode="max", points_to_evaluate=baseline, sampler=sampler)
