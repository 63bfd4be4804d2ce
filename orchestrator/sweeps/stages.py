"""The two stages of a sweep: short search runs, then final runs of the best points and of the baseline configuration."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.experiments.domains import Point
from orchestrator.experiments.spec import TrainExperiment
from orchestrator.experiments.sweep_spec import (
    SweepExperiment,
)
from orchestrator.sweeps.space import SearchSpace
from workloads.config import apply_overrides, build, config_hash, flatten, to_dict

POINT = "point"
"""Key of a trial's settings under which a searcher that lists its points puts one."""

LET_GO_S = 150.0
"""How long a trial's process that was told to stop, or whose driver died, may hold its run; a lock in an object store outlives
its process by a minute."""

BUDGET, SCORE = "step", "score"
"""What a trial tells Tune at each evaluation: how far it is, and what it is ranked by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Trials that differ only in their points: those of the search, or those at full length."""

    sweep: SweepExperiment
    name: str  # of the sweep
    fixed: Mapping[str, Any]  # dotted keys of all trials
    tags: Mapping[str, str]  # of all trials' tracked runs

    def experiment(self, point: Point) -> TrainExperiment:
        """The trial at `point`, under a name that the same configuration has again after a restart.

        Raises:
            ConfigError: the point's values do not go together.
        """
        values = apply_overrides(to_dict(self.sweep.start), {**self.fixed, **point})
        made = build(TrainExperiment, values)
        name = f"{self.name}-{config_hash(made.science)[:8]}"
        return dataclasses.replace(made, tracking=dataclasses.replace(made.tracking, run_name=name))

    @property
    def space(self) -> SearchSpace:
        """The sweep's domains over the experiment's values."""
        return SearchSpace(self.sweep.sweep.space, flatten(self.sweep.start))

    def point_of(self, settings: Mapping[str, Any]) -> Point:
        """The point that a searcher's settings of a trial mean."""
        return dict(settings[POINT]) if POINT in settings else self.space.decode(settings)


def score_of(figures: Mapping[str, Any], rank_by: tuple[str, ...]) -> float | None:
    """The mean of the metrics that trials are ranked by; None if one is missing."""
    values = [figures.get(key) for key in rank_by]
    return None if None in values else sum(map(float, values)) / len(values)  # type: ignore[arg-type]


_TRIAL_DEFAULTS = {
    "evaluation.at_start": False,
    "tracking.log_model": False,
    "tracking.system_metrics": False,
}
"""What no trial needs; `sweep.trial` may say otherwise."""


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
