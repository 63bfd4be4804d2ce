"""Runs a pretraining (`pretrain`) and checks its request (`preflight`); the steps themselves are in `steps`."""

import torch
from torch import Tensor, nn

from workloads.config import config_hash
from workloads.data.loading.loaders import TrainLoader
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.loading.upload import Upload
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.row_groups import check_regions
from workloads.errors import ConfigError
from workloads.evaluation.pretraining import check_measurable, evaluations_of
from workloads.evaluation.representation import RepresentationEvaluation
from workloads.loops.steps import Preflight, Training, run_steps
from workloads.objectives.detco import DetCoConfig
from workloads.parallel.gradient_cache import backward_in_micro_batches
from workloads.parallel.runtime import Runtime
from workloads.spec.factory import AnyObjective, build_objective, render_views
from workloads.spec.loading import load_initial_trunk, load_initial_weights
from workloads.spec.optim import make_optimizer, rate_at
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CheckpointMeta
from workloads.types import ImageBatch


def preflight(settings: PretrainConfig, world_size: int) -> Preflight:
    """Check all of a request that can be checked before it starts: keys, datasets, checkpoints to start from.

    Raises:
        ConfigError, DataError: one sentence with the key or path.
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
            "use group or sync_batch, or set allow_local_statistics=true"
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
            f"images, so that images would be their own negatives; use at most {most}"
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
    """Start or resume the run that `settings` describe; returns the last evaluation's figures and `train/loss`.

    Raises:
        ConfigError, DataError: the request cannot work.
        CheckpointError: the newest checkpoint belongs to another config or dataset, or is damaged.
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was requested to stop.
    """
    dataset, plan = _open(settings)
    torch.manual_seed(settings.seed)
    objective = build_objective(settings)
    _start_from(objective, settings)
    if settings.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    model = runtime.prepare(objective)
    optimizer = make_optimizer(objective, settings.optimizer)
    evaluations = evaluations_of(settings, runtime)
    upload = Upload(runtime.device)

    def update(batch: ImageBatch, step: int) -> dict[str, Tensor]:
        metrics = _update(model, objective, optimizer, upload(batch), settings, runtime.device)
        objective.after_update(step, settings.steps)
        return metrics

    def evaluate(step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        for evaluation in evaluations:
            figures |= evaluation.run(objective, step=step, final=step == settings.steps)
        return figures

    training = Training(
        model=objective,
        optimizer=optimizer,
        loader=TrainLoader(
            dataset,
            plan,
            settings.data,
            rank=runtime.rank,
            world_size=runtime.world_size,
            regions=settings.views.regions_column,
        ),
        identity=CheckpointMeta(step=0, config_sha256=config_hash(settings), manifest_sha256=dataset.manifest.sha256),
        rate=lambda step: settings.optimizer.lr * rate_at(step, settings.steps, settings.schedule),
        update=update,
        evaluate=evaluate if evaluations else None,
        remedy="lower optimizer.lr or raise objective.temperature",
    )
    return run_steps(training, settings, runtime)


def _update(
    model: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: ImageBatch,
    settings: PretrainConfig,
    device: torch.device,
) -> dict[str, Tensor]:
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
