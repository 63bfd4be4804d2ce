"""Checks a sweep before anything starts: its keys, its values and one trial of each."""

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
"""Sections that are not searched: the ruler must not change with what it measures, the rest does not change the result."""


def check_sweep(experiment: SweepExperiment) -> list[Point] | None:
    """Everything that can be known to fail before anything starts; the points, where the searcher knows them before.

    Raises:
        ConfigError, DataError: with the key or path.
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
