"""Checks a sweep before it starts (`check_sweep`): its keys, the extreme values of each, and one whole trial."""

from collections.abc import Mapping
from typing import Any

from orchestrator.experiments.domains import Point
from orchestrator.experiments.sweep_spec import (
    AshaConfig,
    GridSearchConfig,
    MedianConfig,
    OptunaSearchConfig,
    SweepExperiment,
)
from orchestrator.sweeps.stages import Stage, search_stage
from orchestrator.training.run import check_request
from workloads.data.store.manifest import open_dataset
from workloads.errors import ConfigError

_FIXED_SECTIONS = ("evaluation", "tracking", "storage", "failure", "scaling")
"""Sections that may not be searched: the evaluation must be the same for all trials, and the others do not change results."""


def check_sweep(experiment: SweepExperiment) -> list[Point] | None:
    """Check everything that can be checked before the sweep starts; returns `listed_points`.

    Raises:
        ConfigError, DataError: the request cannot work; the message names the key or the path.
    """
    settings = experiment.sweep
    for key in settings.space:
        if key.partition(".")[0] in _FIXED_SECTIONS:
            raise ConfigError(
                f"sweep.space.{key}: the {key.partition('.')[0]} section is the same for all trials; search another key"
            )
    held_out = experiment.evaluation.uri
    if settings.final_seeds and held_out is None:
        raise ConfigError(
            "evaluation.uri: needed to compare the winner with the baseline configuration; or set sweep.final_seeds=0"
        )
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
    misplaced = stage.space.misplaced_baseline()
    if isinstance(settings.searcher, OptunaSearchConfig) and settings.include_start and misplaced:
        raise ConfigError(
            f"sweep.space.{misplaced}: the experiment's own value {stage.space.baseline()[misplaced]!r} is not in it; "
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
        raise ConfigError(f"sweep.trial.{min(clash)}: this key is searched; remove it here or from sweep.space")


def listed_points(experiment: SweepExperiment) -> list[Point] | None:
    """The points of a random or grid search, in order; None for Optuna, whose points depend on results.

    Raises:
        ConfigError: a grid has more points than `sweep.trials`.
    """
    settings = experiment.sweep
    space = search_stage(experiment, name="check", parent=None).space
    baseline = [space.baseline()] if settings.include_start else []
    if isinstance(settings.searcher, OptunaSearchConfig):
        return None
    if isinstance(settings.searcher, GridSearchConfig):
        points = baseline + [point for point in space.grid() if point not in baseline]
        if len(points) > settings.trials:
            raise ConfigError(
                f"sweep.trials: the grid has {len(points)} points, more than {settings.trials} trials; raise sweep.trials, "
                "or search fewer values"
            )
        return points
    return baseline + space.random(settings.trials - len(baseline), seed=settings.seed, known=baseline)
