"""The configuration of a sweep: search algorithm, stopping rule and budget."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.experiments.domains import DomainConfig
from orchestrator.experiments.spec import TrainExperiment
from workloads.config import config


@config
class RandomSearchConfig:
    """Independent draws from the space; grids in it are gone through in turn."""

    kind: Literal["random"] = "random"
    """Which searcher."""


@config
class GridSearchConfig:
    """All combinations of the space's values."""

    kind: Literal["grid"] = "grid"
    """Which searcher."""


@config
class OptunaSearchConfig:
    """Optuna's tree-structured Parzen estimator, which learns from the trials that have ended."""

    kind: Literal["optuna"] = "optuna"
    """Which searcher."""
    random_trials: NonNegativeInt = 6
    """Trials drawn at random before it begins to learn."""


@config
class NoStopperConfig:
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    """Which early stopper."""


@config
class AshaConfig:
    """Asynchronous successive halving (arXiv 1810.05934): at each rung only the best share goes on."""

    kind: Literal["asha"] = "asha"
    """Which early stopper."""
    first_step: PositiveInt
    """The first rung, steps; the others lie at `reduction` times the one before. Evaluations should fall on them."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """One trial of so many goes on at each rung."""


@config
class MedianConfig:
    """Stops a trial that is worse than the median of the others' running means at the same step."""

    kind: Literal["median"] = "median"
    """Which early stopper."""
    first_step: PositiveInt
    """No trial is stopped before, steps."""
    least_trials: PositiveInt = 3
    """No trial is stopped before so many others have come as far."""


@config
class SweepConfig:
    """What is searched, how, and how long. Trials are ranked by the frozen evaluation on images set aside for that."""

    space: Annotated[dict[str, DomainConfig], Field(min_length=1)]
    """Domains by dotted key; kinds: choice, grid, uniform, loguniform, int."""
    selection_uri: str
    """Dataset of images by which trials are ranked: set aside from the training images (`data build … val_share=0.02`), not
    the held-out set of `evaluation.uri`, which is opened once, for the winner and the start."""
    trial: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys that every trial has in place of the experiment's: how short it is, how often it is evaluated."""
    searcher: Annotated[RandomSearchConfig | GridSearchConfig | OptunaSearchConfig, Field(discriminator="kind")] = (
        RandomSearchConfig()
    )
    stopper: Annotated[NoStopperConfig | AshaConfig | MedianConfig, Field(discriminator="kind")] = NoStopperConfig()
    trials: PositiveInt = 12
    """Trials in all, that of the experiment's own values included; of a grid, the most that it may have."""
    hours: PositiveFloat | None = None
    """No trial goes on after so many hours of sweeping; null: no such limit."""
    max_concurrent: PositiveInt | None = None
    """Trials that run at the same time; null: as many as the cluster has CPUs (GPUs) for."""
    include_start: bool = True
    """Whether the first trial has the experiment's own values."""
    rank_by: Annotated[tuple[str, ...], Field(min_length=1)] = ("eval/sga", "eval/photometric/sga")
    """Metrics whose mean is a trial's score; the highest wins."""
    final_seeds: NonNegativeInt = 2
    """Seeds with which the winner and the start are trained at full length and measured on `evaluation.uri`; 0: neither is."""
    seed: NonNegativeInt = 0
    """Seed of the draws from the space; the trials' own is `seed`, the same for all."""


@config
class SweepExperiment(TrainExperiment):
    """An experiment and the search over it; without its `sweep` section, the file is the start of the search."""

    sweep: SweepConfig

    @property
    def start(self) -> TrainExperiment:
        """The experiment itself."""
        names = [field.name for field in dataclasses.fields(TrainExperiment)]
        return TrainExperiment(**{name: getattr(self, name) for name in names})
