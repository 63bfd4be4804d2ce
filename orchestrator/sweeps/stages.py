"""Defines the two stages of a sweep: `search_stage`, its short trials, and `final_stage`, full-length runs of winner and baseline."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.experiments.domains import Point
from orchestrator.experiments.spec import TrainExperiment
from orchestrator.experiments.sweep_spec import (
    SweepExperiment,
)
from orchestrator.sweeps.space import SearchSpace
from workloads.config import apply_overrides, build, config_hash, flatten, to_dict

POINT = "point"
"""Key of a Tune trial's config that holds its point, in a search whose points are listed before it starts."""

LOCK_PATIENCE_S = 150.0
"""How long to wait for the lock of a trial's run. A trial that is stopped, or whose driver died, keeps it until its process
ends; in an object store it expires later."""

BUDGET, SCORE = "step", "score"
"""Keys of what a trial reports to Tune at each evaluation: its step, and the value that it is ranked by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Trials that differ only in their points."""

    kind: Literal["search", "final"]
    sweep: SweepExperiment
    name: str  # of the sweep
    fixed: Mapping[str, Any]  # dotted keys of all trials
    tags: Mapping[str, str]  # of all trials' tracked runs

    def experiment(self, point: Point) -> TrainExperiment:
        """The trial at `point`. Its run name contains the hash of its configuration, so a restarted sweep finds the run again.

        Raises:
            ConfigError: the values of the point contradict each other or the experiment.
        """
        values = apply_overrides(to_dict(self.sweep.start), {**self.fixed, **point})
        trial = build(TrainExperiment, values)
        name = f"{self.name}-{config_hash(trial.science)[:8]}"
        return dataclasses.replace(trial, tracking=dataclasses.replace(trial.tracking, run_name=name))

    @property
    def space(self) -> SearchSpace:
        """The domains of the sweep, with the experiment's own values as the baseline."""
        return SearchSpace(self.sweep.sweep.space, flatten(self.sweep.start))

    def point_of(self, settings: Mapping[str, Any]) -> Point:
        """The point of a Tune trial with the config `settings`."""
        return dict(settings[POINT]) if POINT in settings else self.space.decode(settings)


def score_of(metrics: Mapping[str, float], rank_by: tuple[str, ...]) -> float | None:
    """The mean of the `rank_by` metrics; None if one is missing."""
    values = [metrics[key] for key in rank_by if key in metrics]
    return sum(values) / len(values) if len(values) == len(rank_by) else None


_TRIAL_DEFAULTS = {
    "evaluation.at_start": False,
    "tracking.log_model": False,
    "tracking.system_metrics": False,
}
"""Overrides of every trial; `sweep.trial` goes before them."""


def search_stage(experiment: SweepExperiment, *, name: str, parent: str | None) -> Stage:
    """The short trials, ranked on the selection images."""
    fixed = {**_TRIAL_DEFAULTS, "evaluation.uri": experiment.sweep.selection_uri, **experiment.sweep.trial}
    return Stage(kind="search", sweep=experiment, name=name, fixed=fixed, tags=_tags(name, "search", parent))


def final_stage(experiment: SweepExperiment, *, name: str, parent: str | None) -> Stage:
    """The winner and the baseline configuration at full length, evaluated once on the held-out images."""
    fixed = {**_TRIAL_DEFAULTS, "tracking.log_model": True, "evaluation.every_steps": None}
    return Stage(kind="final", sweep=experiment, name=name, fixed=fixed, tags=_tags(name, "final", parent))


def _tags(name: str, stage: str, parent: str | None) -> dict[str, str]:
    return {"sweep.name": name, "sweep.stage": stage} | ({"mlflow.parentRunId": parent} if parent else {})
