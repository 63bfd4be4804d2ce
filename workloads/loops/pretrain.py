"""Pretraining: from the sample plan's next batch to an update, with a report, a checkpoint and an evaluation now and then."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from workloads.checkpoint import CheckpointError, CheckpointMeta, Restored, take_snapshot
from workloads.config import ConfigError, config_hash, to_yaml
from workloads.data.ledger import Ledger
from workloads.data.manifest import Dataset, open_dataset
from workloads.data.reader import TrainLoader
from workloads.data.row_groups import check_regions
from workloads.data.sample_plan import SamplePlan
from workloads.data.upload import Upload
from workloads.distributed import sum_over_ranks, wait_for_all
from workloads.gradient_cache import backward_in_micro_batches
from workloads.loops.evaluate import RepresentationEvaluation, check_measurable, evaluations_of
from workloads.objectives.detco import DetCoConfig
from workloads.optim import make_optimizer, rate_at
from workloads.runtime import Runtime
from workloads.spec import (
    AnyObjective,
    PretrainConfig,
    build_objective,
    load_initial_trunk,
    load_initial_weights,
    render_views,
)
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


def preflight(settings: PretrainConfig, world_size: int) -> Preflight:
    """Check all of a request that can be checked without starting it.

    Raises:
        ConfigError, DataError, PlanError: one sentence with the key or path.
    """
    dataset, plan = _open(settings)
    if world_size > plan.lanes:
        raise ConfigError(
            f"scaling.num_workers: {world_size} workers are more than the {plan.lanes} lanes of the sample plan; "
            "use fewer workers, or a larger data.lanes (a divisor of global_batch_size)"
        )
    if world_size > 1 and settings.backbone.norm == "batch" and not settings.allow_local_statistics:
        raise ConfigError(
            "backbone.norm: batch normalises over each worker's share, so another number of workers is another model; "
            "use group or sync_batch, or say allow_local_statistics=true"
        )
    check_measurable(settings)
    _check_queue(settings, dataset)
    if settings.init_from is not None or settings.trunk_from is not None:
        _start_from(build_objective(settings), settings)
    held_out = open_dataset(settings.evaluation.uri) if settings.evaluation.uri else None
    if settings.views.regions_column is not None:
        check_regions(dataset, settings.views.regions_column)
    if settings.evaluation.representation is not None:
        RepresentationEvaluation.check(settings.evaluation.representation)
    return Preflight(
        manifest_sha256=dataset.manifest.sha256,
        config_sha256=config_hash(settings),
        num_images=dataset.num_images,
        steps_per_epoch=plan.steps_per_epoch,
        lanes=plan.lanes,
        evaluation_manifest_sha256=held_out.manifest.sha256 if held_out else None,
    )


def _start_from(objective: AnyObjective, settings: PretrainConfig) -> None:
    if settings.init_from is not None:
        load_initial_weights(objective, settings.init_from, device=torch.device("cpu"))
    if settings.trunk_from is not None:
        load_initial_trunk(objective, settings.trunk_from, device=torch.device("cpu"))


def _check_queue(settings: PretrainConfig, dataset: Dataset) -> None:
    if not isinstance(settings.objective, DetCoConfig):
        return
    most = dataset.num_images // 4 // settings.global_batch_size * settings.global_batch_size
    if settings.objective.queue_size > most:
        raise ConfigError(
            f"objective.queue_size: {settings.objective.queue_size} keys are more than a quarter of the {dataset.num_images} "
            f"images, which would be their own negatives; at most {most} here"
        )


def _open(settings: PretrainConfig) -> tuple[Dataset, SamplePlan]:
    dataset = open_dataset(settings.data.uri)
    plan = SamplePlan(
        dataset.row_groups.rows,
        dataset_sha256=dataset.manifest.sha256,
        seed=settings.seed,
        global_batch_size=settings.global_batch_size,
        lanes=settings.data.lanes,
    )
    return dataset, plan


def pretrain(settings: PretrainConfig, runtime: Runtime) -> dict[str, float]:
    """Run or continue the run that `settings` describe; returns the last evaluation's figures and `train/loss`.

    Raises:
        ConfigError, DataError, PlanError: the request cannot work.
        CheckpointError: the newest checkpoint belongs to another config or dataset, or is damaged.
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was asked to stop.
    """
    dataset, plan = _open(settings)
    torch.manual_seed(settings.seed)
    objective = build_objective(settings)
    _start_from(objective, settings)
    if settings.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    model = runtime.prepare(objective)
    optimizer = make_optimizer(objective, settings.optimizer)
    identity = CheckpointMeta(step=0, config_sha256=config_hash(settings), manifest_sha256=dataset.manifest.sha256)
    restored = resume_run(runtime, objective, optimizer, identity)
    step = restored.meta.step if restored is not None else 0

    loader = TrainLoader(
        dataset,
        plan,
        settings.data,
        rank=runtime.rank,
        world_size=runtime.world_size,
        regions=settings.views.regions_column,
    )
    evaluations = evaluations_of(settings, runtime)
    batches = loader.iterate(start_step=step)
    upload = Upload(runtime.device)
    meter = Meter(loader)
    ledger = Ledger(settings.ledger, rank=runtime.rank, world_size=runtime.world_size) if settings.ledger else None
    figures: dict[str, float] = {}
    try:
        if step == 0 and settings.evaluation.at_start:
            for evaluation in evaluations:
                figures |= evaluation.run(objective, step=0, final=False)
        model.train()
        meter.restart() if restored is None else meter.resume(restored.state["window"])
        while step < settings.steps:
            rate = settings.optimizer.lr * rate_at(step, settings.steps, settings.schedule)
            batch = next(batches)
            metrics = _update(model, objective, optimizer, upload(batch), rate, settings, runtime.device)
            objective.after_update(step, settings.steps)
            step += 1
            meter.add(batch, metrics, rate)
            if ledger is not None:
                ledger.add(step, batch)

            last = step == settings.steps
            log = last or step % settings.log_every == 0
            # Ranks must agree, which is waiting for each other: with several of them, where they wait anyway.
            request = runtime.request() if log or runtime.world_size == 1 else "go on"
            every = settings.evaluation.every_steps
            evaluate = bool(evaluations) and (last or (every is not None and step % every == 0))
            save = last or evaluate or request != "go on" or is_due(step, settings, plan.steps_per_epoch)
            if log or save:
                meter.check(step, last_saved(runtime))
                meter.count_bad_rows()
            record = meter.flush(settings.global_batch_size) if log else {}
            runtime.progress(meter.line(), step=step, total_steps=settings.steps)
            if evaluate:
                for evaluation in evaluations:
                    figures |= evaluation.run(objective, step=step, final=last)
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
                        meta = replace(identity, step=step, metrics=figures if evaluate else {})
                        snapshot = take_snapshot(
                            model=objective,
                            optimizer=optimizer,
                            window=meter.window(),
                            config_yaml=to_yaml(settings),
                            meta=meta,
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


class CheckpointRhythm(Protocol):
    """The part of a run's config that says when checkpoints are due."""

    @property
    def checkpoint_every(self) -> int | None: ...
    @property
    def checkpoint_epochs(self) -> int | None: ...


def is_due(step: int, settings: CheckpointRhythm, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is due after `step`."""
    every = settings.checkpoint_every
    if every is not None and step % every == 0:
        return True
    return settings.checkpoint_epochs is not None and step % (settings.checkpoint_epochs * steps_per_epoch) == 0


def _update(
    model: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: ImageBatch,
    rate: float,
    settings: PretrainConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    views = render_views(batch, settings)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        if settings.micro_batch_size is None:
            result = model(views)
        else:
            result = backward_in_micro_batches(objective, views, settings.micro_batch_size)
    if settings.micro_batch_size is None:
        result.loss.backward()
    optimizer.step()
    return dict(result.metrics)


def resume_run(
    runtime: Runtime, objective: nn.Module, optimizer: torch.optim.Optimizer, run: CheckpointMeta
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
    objective.load_state_dict(found.state["model"])
    optimizer.load_state_dict(found.state["optimizer"])
    torch.set_rng_state(found.state["torch_rng"].cpu())
    return found


def last_saved(runtime: Runtime) -> str:
    """In words, which checkpoint a run that cannot go on has left."""
    step = runtime.saved_step()
    return f"the last good checkpoint is that of step {step}" if step is not None else "no checkpoint was written yet"


@dataclass(slots=True)
class Meter:
    """Sums between two records; nothing here waits for the device but `check` and `flush`."""

    loader: TrainLoader
    remedy: str = "lower optimizer.lr or raise objective.temperature"
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
