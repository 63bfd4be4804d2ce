"""The configuration of a sweep: `SweepExperiment`, with the search algorithm, early stopper and budget of its `SweepConfig`."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.experiments.domains import DomainConfig
from orchestrator.experiments.spec import TrainExperiment
from workloads.config import config


@config
class RandomSearchConfig:
    """Independent random draws; the values of a grid are taken in turn."""

    kind: Literal["random"] = "random"
    """Kind of search: random, grid or optuna."""


@config
class GridSearchConfig:
    """All combinations of the values of the space."""

    kind: Literal["grid"] = "grid"
    """Kind of search: random, grid or optuna."""


@config
class OptunaSearchConfig:
    """Optuna's tree-structured Parzen estimator, which learns from finished trials."""

    kind: Literal["optuna"] = "optuna"
    """Kind of search: random, grid or optuna."""
    random_trials: NonNegativeInt = 6
    """Random trials before the estimator is used."""


@config
class NoStopperConfig:
    """No early stopping: every trial runs to its last step."""

    kind: Literal["none"] = "none"
    """Kind of early stopper: none, asha or median."""


@config
class AshaConfig:
    """Asynchronous successive halving (arXiv 1810.05934): only the best share of the trials continues at each rung."""

    kind: Literal["asha"] = "asha"
    """Kind of early stopper: none, asha or median."""
    first_step: PositiveInt
    """First rung, steps; each further rung is `reduction` times the one before. Trials need an evaluation at each."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """One of this many trials continues at each rung."""


@config
class MedianConfig:
    """Stops a trial that scores below the median of the other trials' running means at the same step."""

    kind: Literal["median"] = "median"
    """Kind of early stopper: none, asha or median."""
    first_step: PositiveInt
    """No trial is stopped before this step."""
    least_trials: PositiveInt = 3
    """No trial is stopped before this many others have reached the step."""


@config
class SweepConfig:
    """Search space, search algorithm and budget. Trials are ranked by a frozen evaluation on images that are set aside for it."""

    space: Annotated[dict[str, DomainConfig], Field(min_length=1)]
    """Domains by dotted key; kinds: choice, grid, uniform, loguniform, int."""
    selection_uri: str
    """Dataset on which trials are ranked: images set aside from the training images (`data build … val_share=0.02`). The held-out
    images of `evaluation.uri` are used once, for the winner and the baseline configuration."""
    trial: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys and values that replace the experiment's in every trial, as its steps and evaluation interval."""
    searcher: Annotated[RandomSearchConfig | GridSearchConfig | OptunaSearchConfig, Field(discriminator="kind")] = (
        RandomSearchConfig()
    )
    stopper: Annotated[NoStopperConfig | AshaConfig | MedianConfig, Field(discriminator="kind")] = NoStopperConfig()
    trials: PositiveInt = 12
    """Number of trials, including that of the baseline configuration; for a grid, the largest size allowed."""
    hours: PositiveFloat | None = None
    """Time limit of all trials together, hours; null: none."""
    max_concurrent: PositiveInt | None = None
    """Trials that run at the same time; null: as many as fit the cluster's CPUs and GPUs."""
    include_start: bool = True
    """Whether the first trial is the baseline configuration: the experiment's own values."""
    rank_by: Annotated[tuple[str, ...], Field(min_length=1)] = ("eval/sga", "eval/photometric/sga")
    """Metrics whose mean is the score of a trial; the highest score wins."""
    final_seeds: NonNegativeInt = 2
    """Number of seeds for training the winner and the baseline at full length, evaluated on `evaluation.uri`; 0: not trained."""
    seed: NonNegativeInt = 0
    """Seed of the draws from the space; the trials themselves use the experiment's `seed`."""


@config
class SweepExperiment(TrainExperiment):
    """An experiment with a search over its keys; without the `sweep` section it is the baseline configuration."""

    sweep: SweepConfig

    @property
    def more_places(self) -> dict[str, str | None]:
        """The dataset on which trials are ranked."""
        return {"sweep.selection_uri": self.sweep.selection_uri}

    @property
    def start(self) -> TrainExperiment:
        """The baseline configuration: the experiment without the search."""
        names = [field.name for field in dataclasses.fields(TrainExperiment)]
        return TrainExperiment(**{name: getattr(self, name) for name in names})
