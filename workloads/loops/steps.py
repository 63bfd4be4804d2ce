"""Steps: what every training loop does between two updates: records, evaluations, checkpoints, requests to stop."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from workloads.config import to_yaml
from workloads.data.loading.ledger import Ledger
from workloads.data.loading.loaders import TrainLoader
from workloads.parallel.distributed import sum_over_ranks, wait_for_all
from workloads.parallel.runtime import Runtime
from workloads.storage.checkpoint import CheckpointError, CheckpointMeta, Restored, take_snapshot
from workloads.types import ImageBatch


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names the step, the images and the last good checkpoint."""


class RunStoppedError(Exception):
    """The run was asked to stop, and did so with a checkpoint; the message says at which step."""


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
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was asked to stop.
    """
    model, optimizer, loader = training.model, training.optimizer, training.loader
    restored = _resume(runtime, model, optimizer, training.identity)
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


@dataclass(slots=True)
class Meter:
    """Sums between two records; nothing here waits for the device but `check` and `flush`."""

    loader: TrainLoader
    remedy: str
    steps: int = 0
    timed_steps: int = 0
    rate: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    recent: collections.deque[tuple[str, ...]] = field(default_factory=collections.deque)
    started: float = 0.0
    waited: float = 0.0
    held: float = 0.0
    bad_rows: int = 0
    bad_rows_before: int = 0
    shown: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        self.steps, self.sums = 0, {}
        self.recent.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what went before out of images/s."""
        self.timed_steps = 0
        self.started, self.waited = time.perf_counter(), self.loader.wait_seconds

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Count the time inside as time for which a checkpoint held the steps up."""
        began = time.perf_counter()
        yield
        self.held += time.perf_counter() - began

    def add(self, batch: ImageBatch, metrics: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        self.timed_steps += 1
        self.rate = rate
        self.recent.append(batch.image_ids)
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def count_bad_rows(self) -> None:
        """Add up what did not decode on any rank since the run began; every rank calls it."""
        device = self.sums["train/loss"].device
        here = torch.tensor([self.loader.bad_rows], dtype=torch.float64, device=device)
        self.bad_rows = self.bad_rows_before + int(sum_over_ranks(here))

    def window(self) -> dict[str, Tensor]:
        """The sums since the last record, for a checkpoint: the record after a restart covers the steps before it too."""
        return {**self.sums, "steps": torch.tensor(self.steps), "bad_rows": torch.tensor(self.bad_rows)}

    def resume(self, window: Mapping[str, Tensor]) -> None:
        """Begin with a checkpoint's `window`."""
        self.restart()
        self.steps, self.bad_rows_before = int(window["steps"]), int(window["bad_rows"])
        self.sums = {name: value.clone() for name, value in window.items() if name not in ("steps", "bad_rows")}

    def check(self, step: int, saved: str) -> None:
        """Wait for the device and see that the loss is a number.

        Raises:
            NonFiniteLossError: on every rank alike, since the summed loss is the global batch's.
        """
        loss = float(self.sums["train/loss"]) / self.steps
        if not math.isfinite(loss):
            images = [image for batch in self.recent for image in batch if image]
            shown = ", ".join(images[:8]) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
            raise NonFiniteLossError(
                f"the loss is {loss} within the {self.steps} steps up to step {step} "
                f"(this worker's images: {shown}); {saved}; {self.remedy}"
            )

    def flush(self, global_batch_size: int) -> dict[str, float]:
        """The means since the last record."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).tolist()
        record = {name: value / self.steps for name, value in zip(names, values, strict=True)}
        seconds = time.perf_counter() - self.started
        if self.timed_steps:
            record["train/step_s"] = seconds / self.timed_steps
        record["train/images_per_s"] = self.timed_steps * global_batch_size / seconds
        record["train/data_wait_share"] = (self.loader.wait_seconds - self.waited) / seconds
        record["train/checkpoint_share"] = self.held / seconds
        self.held = 0.0
        record["train/lr"] = self.rate
        record["train/bad_rows"] = float(self.bad_rows)
        self.shown = record
        self.restart()
        return record

    def line(self) -> dict[str, float]:
        """What a progress bar shows: the last record's figures, so that showing them costs nothing."""
        names = ("train/loss", "train/images_per_s", "train/data_wait_share")
        return {name.removeprefix("train/"): self.shown[name] for name in names if name in self.shown}
