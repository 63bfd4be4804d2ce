"""What a run will read, write, hold and take, before anything is spent on it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.experiments.spec import AnyExperiment, ScalingConfig
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.calibration import Calibration, measure
from workloads.data.store.manifest import open_dataset
from workloads.loops.dispatch import preflight


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an experiment asks for."""

    steps: int
    steps_per_epoch: int
    images_trained: int
    views_per_step: int
    num_images: int
    bytes_per_epoch: int
    requests_per_epoch: int  # to the object store; row groups are read by one ranged request each
    checkpoints: int
    checkpoints_kept: int
    evaluations: int
    evaluated_images: int  # by each evaluation
    workers: tuple[int, int]  # fewest, most
    request: dict[str, Any]  # what Ray is asked for
    calibration: Calibration | None = None
    price_per_worker_hour: tuple[float, float] | None = None

    @property
    def hours(self) -> float | None:
        """Wall time with the most workers, start-up aside; None without a calibration."""
        measured = self.calibration
        if measured is None:
            return None
        evaluating = self.evaluations * self.evaluated_images * measured.image_evaluation_s / self.workers[1]
        return (self.steps * measured.step_s + evaluating) / 3600

    @property
    def price(self) -> tuple[float, float] | None:
        """Least and most for all workers over the hours, in the currency of the given prices."""
        if self.hours is None or self.price_per_worker_hour is None:
            return None
        low, high = self.price_per_worker_hour
        return self.hours * self.workers[1] * low, self.hours * self.workers[1] * high

    def to_json(self) -> str:
        """All figures, the derived ones included."""
        return json.dumps({**dataclasses.asdict(self), "hours": self.hours, "price": self.price}, indent=1)

    def lines(self) -> list[tuple[str, str]]:
        """What and how much, for people."""
        epochs = self.steps / self.steps_per_epoch
        fewest, most = self.workers
        told = [
            ("steps", f"{self.steps:,} of {self.views_per_step:,} views; {self.steps_per_epoch:,} an epoch"),
            ("images", f"{self.images_trained:,} ({epochs:.1f} epochs of {self.num_images:,})"),
            ("read", f"{_bytes(self.bytes_per_epoch)} in {self.requests_per_epoch:,} requests an epoch, cache aside"),
            ("evaluations", f"{self.evaluations} of {self.evaluated_images:,} images"),
            ("workers", f"{most}" if fewest == most else f"{fewest} to {most}"),
            ("asks Ray for", json.dumps(self.request)),
        ]
        measured = self.calibration
        if measured is None:
            return [*told, ("checkpoints", f"{self.checkpoints} written, {self.checkpoints_kept} kept at the end")]
        size = measured.checkpoint_bytes
        kept = f"{self.checkpoints_kept} kept ({_bytes(self.checkpoints_kept * size)})"
        told += [
            ("checkpoints", f"{self.checkpoints} of {_bytes(size)} written, {kept}"),
            ("memory", f"{_bytes(measured.peak_bytes)} a worker, measured"),
            (
                "step",
                f"{measured.step_s:.2f} s measured here, of which {measured.data_wait_share:.0%} waiting for data",
            ),
            ("time", f"about {_hours(self.hours or 0.0)}, start-up aside, on machines like this one"),
        ]
        if self.price is not None:
            told.append(("price", f"{self.price[0]:.2f} to {self.price[1]:.2f}"))
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep asks for: its trials, and the winner and the start at full length."""

    trials: int  # at most; an early stopper ends some of them before
    at_once: int | None  # None: as many as the cluster has room for, of which one is reckoned with
    trial: Plan
    finals: int
    final: Plan | None

    @property
    def hours(self) -> float | None:
        """Wall time if no trial is stopped early; None without a calibration."""
        if self.trial.hours is None:
            return None
        rounds = math.ceil(self.trials / (self.at_once or 1)), math.ceil(self.finals / (self.at_once or 1))
        return rounds[0] * self.trial.hours + (rounds[1] * (self.final.hours or 0.0) if self.final else 0.0)

    @property
    def price(self) -> tuple[float, float] | None:
        """Least and most, for all workers of all trials."""
        parts = [(self.trials, self.trial.price), (self.finals, self.final.price if self.final else None)]
        known = [(count, price) for count, price in parts if price is not None]
        if not known:
            return None
        return sum(c * p[0] for c, p in known), sum(c * p[1] for c, p in known)

    def to_json(self) -> str:
        """All figures, the derived ones included."""
        return json.dumps({**dataclasses.asdict(self), "hours": self.hours, "price": self.price}, indent=1)

    def lines(self) -> list[tuple[str, str]]:
        """What and how much, for people."""
        at_once = "as many at once as there is room for" if self.at_once is None else f"{self.at_once} at once"
        told = [("trials", f"at most {self.trials}, {at_once}; each:")]
        told += [(f"  {what}", how_much) for what, how_much in self.trial.lines()]
        if self.final is not None:
            told += [("full length", f"{self.finals} runs of the winner and the start; each:")]
            told += [(f"  {what}", how_much) for what, how_much in self.final.lines()]
        if self.hours is not None:
            told.append(("in all", f"about {_hours(self.hours)} if no trial is stopped early, start-ups aside"))
        if self.price is not None:
            told.append(("price", f"{self.price[0]:.2f} to {self.price[1]:.2f}"))
        return told


def plan_sweep(
    experiment: SweepExperiment, *, calibrate: bool = True, price: tuple[float, float] | None = None
) -> SweepPlan:
    """As `plan_run`, for a trial and for a run at full length.

    Raises:
        ConfigError, DataError: what `sweep` would refuse too.
        CalibrationError: the measured steps failed.
    """
    from orchestrator.sweeps.checks import check_sweep
    from orchestrator.sweeps.stages import final_stage, search_stage

    points = check_sweep(experiment)
    settings = experiment.sweep
    trial = search_stage(experiment, name="plan", parent=None).experiment({})
    final = final_stage(experiment, name="plan", parent=None).experiment({})
    return SweepPlan(
        trials=settings.trials if points is None else len(points),
        at_once=settings.max_concurrent,
        trial=plan_run(trial, calibrate=calibrate, price=price),
        finals=2 * settings.final_seeds,
        final=plan_run(final, calibrate=calibrate, price=price) if settings.final_seeds else None,
    )


def plan_run(experiment: AnyExperiment, *, calibrate: bool = True, price: tuple[float, float] | None = None) -> Plan:
    """Count what `experiment` will do; with `calibrate`, measure a few steps in a process of their own.

    Args:
        price: least and most for one worker's hour.

    Raises:
        ConfigError, DataError: what `train` would refuse too.
        CalibrationError: the measured steps failed.
    """
    scaling = experiment.scaling
    checked = preflight(experiment.science, scaling.most_workers)
    dataset = open_dataset(experiment.data.uri)
    lengths = dataset.row_groups.length
    held_out = open_dataset(experiment.evaluation.uri).num_images if experiment.evaluation.uri else 0
    evaluated = min(held_out, experiment.evaluation.limit or held_out)
    return Plan(
        steps=experiment.steps,
        steps_per_epoch=checked.steps_per_epoch,
        images_trained=experiment.steps * experiment.global_batch_size,
        views_per_step=experiment.global_batch_size * experiment.views.views_per_image,
        num_images=checked.num_images,
        bytes_per_epoch=int(np.sum(lengths, dtype=np.int64)),
        requests_per_epoch=len(lengths),
        checkpoints=len(_checkpoint_steps(experiment, checked.steps_per_epoch)),
        checkpoints_kept=_kept(experiment, checked.steps_per_epoch),
        evaluations=len(_evaluation_steps(experiment)),
        evaluated_images=evaluated,
        workers=(scaling.fewest_workers, scaling.most_workers),
        request=resource_request(scaling),
        calibration=measure(experiment) if calibrate else None,
        price_per_worker_hour=price,
    )


def resource_request(scaling: ScalingConfig) -> dict[str, Any]:
    """The placement group that a run of the most workers asks Ray for."""
    bundle = {"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})}
    return {"bundles": [bundle] * scaling.most_workers, "strategy": scaling.placement}


def _evaluation_steps(experiment: AnyExperiment) -> set[int]:
    if experiment.evaluation.uri is None:
        return set()
    every = experiment.evaluation.every_steps or experiment.steps
    return {*range(0 if experiment.evaluation.at_start else every, experiment.steps, every), experiment.steps}


def _checkpoint_steps(experiment: AnyExperiment, steps_per_epoch: int) -> set[int]:
    steps = experiment.steps
    found = {steps} | (_evaluation_steps(experiment) - {0})
    for every in (experiment.checkpoint_every, (experiment.checkpoint_epochs or 0) * steps_per_epoch):
        if every:
            found |= set(range(every, steps + 1, every))
    return found


def _kept(experiment: AnyExperiment, steps_per_epoch: int) -> int:
    newest = min(experiment.storage.keep_checkpoints, len(_checkpoint_steps(experiment, steps_per_epoch)))
    has_best = experiment.storage.best_metric is not None and experiment.evaluation.uri is not None
    return newest + int(has_best)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _hours(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"
