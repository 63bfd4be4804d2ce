"""Estimates a run (`plan_run`) or a sweep (`plan_sweep`) before it starts: data, checkpoints, evaluations, memory, time, price."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.experiments.spec import AnyExperiment, ScalingConfig, TrainExperiment
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.calibration import Calibration, measure
from workloads.data.store.manifest import open_dataset
from workloads.evaluation.representation import RepresentationEvaluation
from workloads.loops.dispatch import preflight


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The figures of one run."""

    steps: int
    steps_per_epoch: int
    images_trained: int
    views_per_step: int
    num_images: int
    bytes_per_epoch: int
    requests_per_epoch: int
    """Requests to the object store: one for each row group."""
    checkpoints: int
    checkpoints_kept: int
    evaluations: int
    evaluated_images: int
    """Images of `evaluation.uri` in each evaluation."""
    representation_images: int
    """Labelled images, for training and test, whose features each evaluation extracts."""
    workers: tuple[int, int]
    """Fewest and most workers."""
    request: dict[str, Any]
    """The placement group that Ray is asked for."""
    calibration: Calibration | None = None
    price_per_worker_hour: tuple[float, float] | None = None

    @property
    def hours(self) -> float | None:
        """Wall time with the most workers, without the start and a linear probe's training; None without a calibration."""
        measured = self.calibration
        if measured is None:
            return None
        evaluation_s = self.evaluated_images * measured.image_evaluation_s
        evaluation_s += self.representation_images * measured.representation_image_s
        return (self.steps * measured.step_s + self.evaluations * evaluation_s / self.workers[1]) / 3600

    @property
    def price(self) -> tuple[float, float] | None:
        """Lowest and highest price of all workers, in the currency of the given prices; None if it is not known."""
        if self.hours is None or self.price_per_worker_hour is None:
            return None
        low, high = self.price_per_worker_hour
        return self.hours * self.workers[1] * low, self.hours * self.workers[1] * high

    def to_json(self) -> str:
        """All figures as JSON, including the derived ones."""
        return json.dumps({**dataclasses.asdict(self), "hours": self.hours, "price": self.price}, indent=1)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each figure."""
        epochs = self.steps / self.steps_per_epoch
        fewest, most = self.workers
        rows = [
            ("steps", f"{self.steps:,} of {self.views_per_step:,} views; {self.steps_per_epoch:,} an epoch"),
            ("images", f"{self.images_trained:,} ({epochs:.1f} epochs of {self.num_images:,})"),
            (
                "read",
                f"{_bytes(self.bytes_per_epoch)} in {self.requests_per_epoch:,} requests an epoch, without the cache",
            ),
            ("evaluations", f"{self.evaluations} of {self.evaluated_images + self.representation_images:,} images"),
            ("workers", f"{most}" if fewest == most else f"{fewest} to {most}"),
            ("asks Ray for", json.dumps(self.request)),
        ]
        measured = self.calibration
        if measured is None:
            return [*rows, ("checkpoints", f"{self.checkpoints} written, {self.checkpoints_kept} kept at the end")]
        size = measured.checkpoint_bytes
        kept = f"{self.checkpoints_kept} kept ({_bytes(self.checkpoints_kept * size)})"
        rows += [
            ("checkpoints", f"{self.checkpoints} of {_bytes(size)} written, {kept}"),
            ("memory", f"{_bytes(measured.peak_bytes)} a worker, measured"),
            (
                "step",
                f"{measured.step_s:.2f} s measured here, of which {measured.data_wait_share:.0%} waiting for data",
            ),
            ("time", f"about {_hours(self.hours or 0.0)} without the start, on machines like this one"),
        ]
        if self.price is not None:
            rows.append(("price", f"{self.price[0]:.2f} to {self.price[1]:.2f}"))
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The figures of a sweep: its trials, then the winner and the baseline configuration at full length."""

    trials: int
    """Most trials; an early stopper may end some of them before their last step."""
    at_once: int | None
    """Trials that run at the same time; None: as many as the cluster has room for, and the time is that of one at a time."""
    trial: Plan
    finals: int
    """Runs at full length."""
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
        """Lowest and highest price of all workers of all trials; None if it is not known."""
        parts = [(self.trials, self.trial.price), (self.finals, self.final.price if self.final else None)]
        known = [(count, price) for count, price in parts if price is not None]
        if not known:
            return None
        return sum(c * p[0] for c, p in known), sum(c * p[1] for c, p in known)

    def to_json(self) -> str:
        """All figures as JSON, including the derived ones."""
        return json.dumps({**dataclasses.asdict(self), "hours": self.hours, "price": self.price}, indent=1)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each figure."""
        at_once = "as many at once as there is room for" if self.at_once is None else f"{self.at_once} at once"
        rows = [("trials", f"at most {self.trials}, {at_once}; each:")]
        rows += [(f"  {label}", text) for label, text in self.trial.lines()]
        if self.final is not None:
            rows += [("full length", f"{self.finals} runs of the winner and the baseline configuration; each:")]
            rows += [(f"  {label}", text) for label, text in self.final.lines()]
        if self.hours is not None:
            rows.append(("in all", f"about {_hours(self.hours)} if no trial is stopped early, without the starts"))
        if self.price is not None:
            rows.append(("price", f"{self.price[0]:.2f} to {self.price[1]:.2f}"))
        return rows


def plan_sweep(
    experiment: SweepExperiment, *, calibrate: bool = True, price: tuple[float, float] | None = None
) -> SweepPlan:
    """Plan a trial and a run at full length; see `plan_run`.

    Raises:
        ConfigError, DataError: `sweep` would refuse the experiment too.
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
    """Count what `experiment` will read, evaluate and write; with `calibrate`, measure a few steps in a separate process.

    Args:
        price: lowest and highest price of one worker for an hour.

    Raises:
        ConfigError, DataError: `train` would refuse the experiment too.
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
        representation_images=_representation_images(experiment),
        workers=(scaling.fewest_workers, scaling.most_workers),
        request=resource_request(scaling),
        calibration=measure(experiment) if calibrate else None,
        price_per_worker_hour=price,
    )


def resource_request(scaling: ScalingConfig) -> dict[str, Any]:
    """The placement group of a run with its most workers."""
    bundle = {"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})}
    return {"bundles": [bundle] * scaling.most_workers, "strategy": scaling.placement}


def _representation_images(experiment: AnyExperiment) -> int:
    if not isinstance(experiment, TrainExperiment) or experiment.evaluation.representation is None:
        return 0
    split = RepresentationEvaluation.check(experiment.evaluation.representation)[2]
    return len(split.train) + len(split.test)


def _is_evaluated(experiment: AnyExperiment) -> bool:
    if experiment.evaluation.uri is not None:
        return True
    return isinstance(experiment, TrainExperiment) and experiment.evaluation.representation is not None


def _evaluation_steps(experiment: AnyExperiment) -> set[int]:
    if not _is_evaluated(experiment):
        return set()
    every = experiment.evaluation.every_steps or experiment.steps
    return {*range(0 if experiment.evaluation.at_start else every, experiment.steps, every), experiment.steps}


def _checkpoint_steps(experiment: AnyExperiment, steps_per_epoch: int) -> set[int]:
    steps = experiment.steps
    saved = {steps} | (_evaluation_steps(experiment) - {0})
    for every in (experiment.checkpoint_every, (experiment.checkpoint_epochs or 0) * steps_per_epoch):
        if every:
            saved |= set(range(every, steps + 1, every))
    return saved


def _kept(experiment: AnyExperiment, steps_per_epoch: int) -> int:
    newest = min(experiment.storage.keep_checkpoints, len(_checkpoint_steps(experiment, steps_per_epoch)))
    has_best = experiment.storage.best_metric is not None and _is_evaluated(experiment)
    return newest + int(has_best)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _hours(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"
