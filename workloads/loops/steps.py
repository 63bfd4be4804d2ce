"""Steps: what every training loop does between two updates: records, evaluations, checkpoints, requests to stop."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

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
    """What is known of a run before anything starts."""

    manifest_sha256: str
    config_sha256: str
    num_images: int
    steps_per_epoch: int
    lanes: int
    evaluation_manifest_sha256: str | None


class EvaluationRhythm(Protocol):
    """The part of an evaluation's config that says when it is due."""

    @property
    def at_start(self) -> bool: ...
    @property
    def every_steps(self) -> int | None: ...


class StepsConfig(Protocol):
    """The part of a run's config that says how many steps there are and what is due when."""

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
    """What is trained, and how one step of it is taken."""

    model: nn.Module
    """The networks whose state checkpoints keep; in train mode during steps."""
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    identity: CheckpointMeta
    """Of which configuration and dataset a checkpoint must be, to be continued."""
    rate: Callable[[int], float]
    """Learning rate of the step that begins, counted from 0."""
    update: Callable[[ImageBatch, int], dict[str, Tensor]]
    """One update from a batch, at the learning rate that the optimizer's groups have; its metrics, on the device."""
    evaluate: Callable[[int], dict[str, float]] | None
    """Measure and report after a step, on every rank alike; figures on rank 0."""
    remedy: str
    """What to do about a loss that is no number."""


def run_steps(training: Training, settings: StepsConfig, runtime: Runtime) -> dict[str, float]:
    """Run or continue to the last step; returns the last evaluation's figures and `train/loss`.

    Raises:
        CheckpointError: the newest checkpoint belongs to another config or dataset, or is damaged.
        ConfigError: the disk has no room for a checkpoint.
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was asked to stop.
    """
    model, optimizer, loader = training.model, training.optimizer, training.loader
    restored = _resume(runtime, model, optimizer, training.identity)
    if runtime.rank == 0:
        runtime.check_space(checkpoint_bytes(model, optimizer))
    step = restored.meta.step if restored is not None else 0
    batches = loader.iterate(start_step=step)
    meter = Meter(loader, remedy=training.remedy)
    ledger = Ledger(settings.ledger, rank=runtime.rank, world_size=runtime.world_size) if settings.ledger else None
    figures: dict[str, float] = {}
    try:
        if step == 0 and training.evaluate is not None and settings.evaluation.at_start:
            figures = training.evaluate(0)
        model.train()
        meter.restart() if restored is None else meter.resume(restored.state["window"])
        while step < settings.steps:
            rate = training.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(batches)
            metrics = training.update(batch, step)
            step += 1
            meter.add(batch, metrics, rate)
            if ledger is not None:
                ledger.add(step, batch)

            last = step == settings.steps
            log = last or step % settings.log_every == 0
            # Ranks must agree, which is waiting for each other: with several of them, where they wait anyway.
            request = runtime.request() if log or runtime.world_size == 1 else "go on"
            every = settings.evaluation.every_steps
            evaluate = training.evaluate is not None and (last or (every is not None and step % every == 0))
            save = last or evaluate or request != "go on" or _is_due(step, settings, loader.plan.steps_per_epoch)
            if log or save:
                meter.check(step, _last_saved(runtime))
                meter.count_bad_rows()
            record = meter.flush(settings.global_batch_size) if log else {}
            runtime.progress(meter.line(), step=step, total_steps=settings.steps)
            if evaluate and training.evaluate is not None:
                figures |= training.evaluate(step)
                model.train()
                meter.restart_clock()
            if record:
                figures["train/loss"] = record["train/loss"]
                runtime.report(record, step=step)
            if save:  # after the evaluation: a checkpoint of the last step says that the run is complete
                if ledger is not None:
                    ledger.close_segment(step)
                with meter.holding():
                    if runtime.rank == 0:
                        snapshot = take_snapshot(
                            model=model,
                            optimizer=optimizer,
                            window=meter.window(),
                            config_yaml=to_yaml(settings),
                            meta=replace(training.identity, step=step, metrics=figures if evaluate else {}),
                        )
                        runtime.save(snapshot)
            if request == "stop" and not last:
                runtime.flush()
                wait_for_all()  # the first rank to end has the others killed: none may before the checkpoint is whole
                raise RunStoppedError(
                    f"stopped on request after step {step} of {settings.steps}, with a checkpoint; "
                    "give the same command again to continue"
                )
        runtime.flush()
    finally:
        batches.close()  # type: ignore[attr-defined]
    return figures


def _is_due(step: int, settings: StepsConfig, steps_per_epoch: int) -> bool:
    every = settings.checkpoint_every
    if every is not None and step % every == 0:
        return True
    return settings.checkpoint_epochs is not None and step % (settings.checkpoint_epochs * steps_per_epoch) == 0


def _resume(
    runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, run: CheckpointMeta
) -> Restored | None:
    """Load the newest checkpoint, if there is one."""
    found = runtime.restore()
    if found is None:
        return None
    for what in ("config_sha256", "manifest_sha256"):
        if getattr(found.meta, what) != getattr(run, what):
            raise CheckpointError(
                f"the checkpoint of step {found.meta.step} belongs to another "
                f"{'configuration' if what.startswith('config') else 'dataset'} "
                f"({what} {getattr(found.meta, what)[:12]}…, this run has {getattr(run, what)[:12]}…); "
                "choose another name or output for this run"
            )
    model.load_state_dict(found.state["model"])
    optimizer.load_state_dict(found.state["optimizer"])
    torch.set_rng_state(found.state["torch_rng"].cpu())
    return found


def _last_saved(runtime: Runtime) -> str:
    """In words, which checkpoint a run that cannot go on has left."""
    step = runtime.saved_step()
    return f"the last good checkpoint is that of step {step}" if step is not None else "no checkpoint was written yet"
