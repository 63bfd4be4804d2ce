"""Runs the steps of a training loop (`run_steps`): updates, and between them records, evaluations, checkpoints, stop requests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from workloads.config import to_yaml
from workloads.data.loading.ledger import Ledger
from workloads.data.loading.loaders import TrainLoader
from workloads.errors import RunStoppedError
from workloads.loops.meter import Meter
from workloads.parallel.distributed import wait_for_all
from workloads.parallel.runtime import Runtime
from workloads.storage.checkpoint import CheckpointError, CheckpointMeta, Restored, take_snapshot
from workloads.storage.space import checkpoint_bytes
from workloads.types import ImageBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Facts about a run that are checked and recorded before it starts."""

    manifest_sha256: str
    config_sha256: str
    num_images: int
    steps_per_epoch: int
    lanes: int
    evaluation_manifest_sha256: str | None


class EvaluationRhythm(Protocol):
    """The keys of an evaluation's config that say when it is due."""

    @property
    def at_start(self) -> bool: ...
    @property
    def every_steps(self) -> int | None: ...


class StepsConfig(Protocol):
    """The keys of a run's config that say how many steps there are and what is due when."""

    @property
    def steps(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def ledger(self) -> str | None: ...
    @property
    def evaluation(self) -> EvaluationRhythm: ...
    @property
    def checkpoint_every(self) -> int | None: ...
    @property
    def checkpoint_epochs(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A model, its data, and the functions that `run_steps` calls for an update and an evaluation."""

    model: nn.Module
    """The networks whose state is written to checkpoints; in train mode during steps."""
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    identity: CheckpointMeta
    """Hashes of the configuration and dataset, which a checkpoint must share for the run to resume from it."""
    rate: Callable[[int], float]
    """Learning rate of the step that begins, counted from 0."""
    update: Callable[[ImageBatch, int], dict[str, Tensor]]
    """Makes one update from a batch, at the learning rate of the optimizer's groups; returns its metrics, on the device."""
    evaluate: Callable[[int], dict[str, float]] | None
    """Measures and reports after a step; every rank calls it, rank 0 gets the figures."""
    remedy: str
    """Advice for the error message about a loss that is not finite."""


@dataclass(frozen=True, slots=True)
class _Due:
    """What follows an update."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


def run_steps(training: Training, settings: StepsConfig, runtime: Runtime) -> dict[str, float]:
    """Start or resume the run and take it to its last step; returns the last evaluation's figures and `train/loss`.

    Raises:
        CheckpointError: the newest checkpoint belongs to another config or dataset, or is damaged.
        ConfigError: the disk has no room for a checkpoint.
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was requested to stop.
    """
    restored = _resume(runtime, training)
    step = restored.meta.step if restored is not None else 0
    if runtime.rank == 0 and step < settings.steps:
        runtime.check_space(checkpoint_bytes(training.model, training.optimizer))
    batches = training.loader.iterate(start_step=step)
    meter = Meter(training.loader, remedy=training.remedy)
    ledger = Ledger(settings.ledger, rank=runtime.rank, world_size=runtime.world_size) if settings.ledger else None
    figures: dict[str, float] = {}
    try:
        if step == 0 and training.evaluate is not None and settings.evaluation.at_start:
            figures = training.evaluate(0)
        training.model.train()
        meter.restart() if restored is None else meter.resume(restored.state["window"])
        while step < settings.steps:
            rate = _set_rate(training, step)
            batch = next(batches)
            metrics = training.update(batch, step)
            step += 1
            meter.add(batch, metrics, rate)
            if ledger is not None:
                ledger.add(step, batch)

            due = _due_after(step, training, settings, runtime)
            if due.log or due.save:
                meter.check(step, _last_saved(runtime))
                meter.count_bad_rows()
            record = meter.flush(settings.global_batch_size) if due.log else {}
            runtime.progress(meter.line(), step=step, total_steps=settings.steps)
            if due.evaluate and training.evaluate is not None:
                figures |= training.evaluate(step)
                training.model.train()
                meter.restart_clock()
            if record:
                figures["train/loss"] = record["train/loss"]
                runtime.report(record, step=step)
            if due.save:  # after the evaluation: a checkpoint of the last step says that the run is complete
                if ledger is not None:
                    ledger.close_segment(step)
                _save(training, settings, runtime, meter, step=step, metrics=figures if due.evaluate else {})
            if due.stop:
                _stop(runtime, step, settings.steps)
        runtime.flush()
    finally:
        batches.close()  # type: ignore[attr-defined]
    return figures


def _set_rate(training: Training, step: int) -> float:
    """Set and return the learning rate of the step that begins."""
    rate = training.rate(step)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    return rate


def _due_after(step: int, training: Training, settings: StepsConfig, runtime: Runtime) -> _Due:
    last = step == settings.steps
    log = last or step % settings.log_every == 0
    # Ranks must agree on a request, which makes them wait for each other: with several, only where they wait anyway.
    request = runtime.request() if log or runtime.world_size == 1 else "go on"
    every = settings.evaluation.every_steps
    evaluate = training.evaluate is not None and (last or (every is not None and step % every == 0))
    save = last or evaluate or request != "go on" or _is_due(step, settings, training.loader.plan.steps_per_epoch)
    return _Due(log=log, evaluate=evaluate, save=save, stop=request == "stop" and not last)


def _is_due(step: int, settings: StepsConfig, steps_per_epoch: int) -> bool:
    every = settings.checkpoint_every
    if every is not None and step % every == 0:
        return True
    return settings.checkpoint_epochs is not None and step % (settings.checkpoint_epochs * steps_per_epoch) == 0


def _save(
    training: Training,
    settings: StepsConfig,
    runtime: Runtime,
    meter: Meter,
    *,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Take a snapshot on rank 0, which the runtime writes while training continues."""
    with meter.holding():
        if runtime.rank == 0:
            snapshot = take_snapshot(
                model=training.model,
                optimizer=training.optimizer,
                window=meter.window(),
                config_yaml=to_yaml(settings),
                meta=replace(training.identity, step=step, metrics=metrics),
            )
            runtime.save(snapshot)


def _stop(runtime: Runtime, step: int, steps: int) -> NoReturn:
    """End the run once its checkpoint is complete.

    Raises:
        RunStoppedError: always.
    """
    runtime.flush()
    wait_for_all()  # the first rank to end has the others killed: none may before the checkpoint is complete
    raise RunStoppedError(
        f"stopped on request after step {step} of {steps}, with a checkpoint; give the same command again to continue"
    )


def _resume(runtime: Runtime, training: Training) -> Restored | None:
    """Load the newest checkpoint, if there is one, into the model and the optimizer."""
    restored = runtime.restore()
    if restored is None:
        return None
    for what, ours in (
        ("configuration", training.identity.config_sha256),
        ("dataset", training.identity.manifest_sha256),
    ):
        theirs = restored.meta.config_sha256 if what == "configuration" else restored.meta.manifest_sha256
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint of step {restored.meta.step} belongs to another {what} "
                f"(SHA-256 {theirs[:12]}…, of this run {ours[:12]}…); choose another name or output for this run"
            )
    training.model.load_state_dict(restored.state["model"])
    training.optimizer.load_state_dict(restored.state["optimizer"])
    torch.set_rng_state(restored.state["torch_rng"].cpu())
    return restored


def _last_saved(runtime: Runtime) -> str:
    """The part of an error message that says from which step the run can continue."""
    step = runtime.saved_step()
    return f"the last good checkpoint is that of step {step}" if step is not None else "no checkpoint was written yet"
