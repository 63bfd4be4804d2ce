"""Pretraining: from the sample plan's next batch to an update, with a report, a checkpoint and an evaluation now and then."""

import collections
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workloads.checkpoint import CheckpointError, CheckpointMeta, new_folder, read_meta, read_state, write_checkpoint
from workloads.config import ConfigError, config_hash, to_yaml
from workloads.data.manifest import Dataset, open_dataset
from workloads.data.reader import TrainLoader
from workloads.data.sample_plan import SamplePlan
from workloads.data.views import make_views
from workloads.loops.evaluate import GridEvaluation
from workloads.optim import make_optimizer, rate_at
from workloads.runtime import Runtime
from workloads.spec import PretrainConfig, build_objective
from workloads.types import ImageBatch


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names the step, the images and the last good checkpoint."""


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
    held_out = open_dataset(settings.evaluation.uri) if settings.evaluation.uri else None
    missing = set(settings.evaluation.protocol.levels) - set(settings.objective.levels)
    if held_out is not None and missing:
        raise ConfigError(
            f"evaluation.protocol.levels: {', '.join(sorted(missing))} is not trained; add it to objective.levels"
        )
    return Preflight(
        manifest_sha256=dataset.manifest.sha256,
        config_sha256=config_hash(settings),
        num_images=dataset.num_images,
        steps_per_epoch=plan.steps_per_epoch,
        lanes=plan.lanes,
        evaluation_manifest_sha256=held_out.manifest.sha256 if held_out else None,
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
    """
    dataset, plan = _open(settings)
    torch.manual_seed(settings.seed)
    objective = build_objective(settings)
    if settings.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    model = runtime.prepare(objective)
    optimizer = make_optimizer(objective, settings.optimizer)
    meta = CheckpointMeta(step=0, config_sha256=config_hash(settings), manifest_sha256=dataset.manifest.sha256)
    step = _resume(runtime, objective, optimizer, meta)

    loader = TrainLoader(dataset, plan, settings.data, rank=runtime.rank, world_size=runtime.world_size)
    evaluation = GridEvaluation.of(settings, runtime)
    batches = loader.iterate(start_step=step)
    meter = _Meter(loader)
    figures: dict[str, float] = {}
    try:
        if step == 0 and evaluation is not None:
            figures = evaluation.run(objective, step=0, untrained=False)
        model.train()
        meter.restart()
        while step < settings.steps:
            rate = settings.optimizer.lr * rate_at(step, settings.steps, settings.schedule)
            batch = next(batches)
            metrics = _update(model, optimizer, batch, rate, settings, runtime.device)
            step += 1
            meter.add(batch, metrics, rate)

            last = step == settings.steps
            due = settings.checkpoint_every is not None and step % settings.checkpoint_every == 0
            log = last or due or step % settings.log_every == 0
            record = meter.flush(step, settings.global_batch_size, _saved(runtime)) if log else {}
            if runtime.rank == 0:
                runtime.progress(meter.line(), step=step, total_steps=settings.steps)
            every = settings.evaluation.every_steps
            if evaluation is not None and (last or (every is not None and step % every == 0)):
                figures |= evaluation.run(objective, step=step, untrained=last)
                model.train()
                meter.restart()
            # After the evaluation: a checkpoint of the last step says that the run is complete.
            if record:
                folder = None
                if (last or due) and runtime.rank == 0:
                    folder = new_folder()
                    at = CheckpointMeta(
                        step=step, config_sha256=meta.config_sha256, manifest_sha256=meta.manifest_sha256
                    )
                    write_checkpoint(
                        folder, model=objective, optimizer=optimizer, config_yaml=to_yaml(settings), meta=at
                    )
                runtime.report(record, step=step, folder=folder)
                figures["train/loss"] = record["train/loss"]
    finally:
        batches.close()  # type: ignore[attr-defined]
    return figures


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: ImageBatch,
    rate: float,
    settings: PretrainConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    views = make_views(batch.to(device), settings.views, seed=settings.seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        result = model(views)
    optimizer.zero_grad(set_to_none=True)
    result.loss.backward()
    optimizer.step()
    return dict(result.metrics)


def _resume(runtime: Runtime, objective: nn.Module, optimizer: torch.optim.Optimizer, run: CheckpointMeta) -> int:
    """Load the newest checkpoint, if there is one; returns the number of updates already done."""
    folder = runtime.latest_checkpoint()
    if folder is None:
        return 0
    found = read_meta(folder)
    for what in ("config_sha256", "manifest_sha256"):
        if getattr(found, what) != getattr(run, what):
            raise CheckpointError(
                f"{folder}: belongs to another {'configuration' if what.startswith('config') else 'dataset'} "
                f"({what} {getattr(found, what)[:12]}…, this run has {getattr(run, what)[:12]}…); "
                "choose another name or output for this run"
            )
    state = read_state(folder, device=runtime.device)
    objective.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"].cpu())
    return int(state["step"])


def _saved(runtime: Runtime) -> str:
    folder = runtime.latest_checkpoint()
    return f"the last good checkpoint is {folder.name}" if folder else "no checkpoint was written yet"


@dataclass(slots=True)
class _Meter:
    """Sums between two records; nothing here waits for the device but `flush`."""

    loader: TrainLoader
    steps: int = 0
    rate: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    recent: collections.deque[tuple[str, ...]] = field(default_factory=collections.deque)
    started: float = 0.0
    waited: float = 0.0
    shown: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        self.steps, self.sums = 0, {}
        self.recent.clear()
        self.started, self.waited = time.perf_counter(), self.loader.wait_seconds

    def add(self, batch: ImageBatch, metrics: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        self.rate = rate
        self.recent.append(batch.image_ids)
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def flush(self, step: int, global_batch_size: int, saved: str) -> dict[str, float]:
        """The means since the last record; waits for the device once.

        Raises:
            NonFiniteLossError: on every rank alike, since the summed loss is the global batch's.
        """
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).tolist()  # the one synchronisation
        record = {name: value / self.steps for name, value in zip(names, values, strict=True)}
        if not math.isfinite(record["train/loss"]):
            images = [image for batch in self.recent for image in batch if image]
            shown = ", ".join(images[:8]) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
            raise NonFiniteLossError(
                f"the loss is {record['train/loss']} within the {self.steps} steps up to step {step} "
                f"(this worker's images: {shown}); {saved}; lower optimizer.lr or raise objective.temperature"
            )
        seconds = time.perf_counter() - self.started
        record["train/images_per_s"] = self.steps * global_batch_size / seconds
        record["train/data_wait_share"] = (self.loader.wait_seconds - self.waited) / seconds
        record["train/lr"] = self.rate
        record["train/bad_rows"] = float(self.loader.bad_rows)
        self.shown = record
        self.restart()
        return record

    def line(self) -> dict[str, float]:
        """What a progress bar shows: the last record's figures, so that showing them costs nothing."""
        names = ("train/loss", "train/images_per_s", "train/data_wait_share")
        return {name.removeprefix("train/"): self.shown[name] for name in names if name in self.shown}
