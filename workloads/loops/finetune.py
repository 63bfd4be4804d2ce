"""Fine-tunes a detector on a pretrained trunk: `FinetuneConfig`, `finetune`, `load_detector`, `evaluate_detector`."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from workloads.config import build, config, config_hash, parse_yaml
from workloads.data.loading.loaders import TrainLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.subset_plan import SubsetPlan
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.objects import (
    Objects,
    PanopticMasks,
    category_names,
    read_objects,
    read_panoptic,
    select_images,
)
from workloads.data.views.counter_random import stream
from workloads.data.views.detection import DetectionViews, DetectionViewsConfig, LabelledObjects, make_detection_views
from workloads.errors import ConfigError, DataError
from workloads.evaluation.detection import DetectionEvaluation, DetectionEvaluationConfig
from workloads.loops.steps import Preflight, Training, run_steps
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.models.detector import Detector, DetectorConfig
from workloads.models.trunks import (
    CheckpointTrunkConfig,
    RandomTrunkConfig,
    ResNetTrunkConfig,
    load_pyramid,
    load_resnet,
)
from workloads.parallel.runtime import Runtime
from workloads.spec.optim import DropScheduleConfig, OptimizerConfig, SGDConfig, dropped_rate_at, make_optimizer
from workloads.storage.checkpoint import CONFIG, CheckpointMeta, read_checkpoint, read_meta
from workloads.storage.filesystems import read_bytes, resolve_uri
from workloads.types import ImageBatch


@config
class FinetuneConfig:
    """A fine-tuning run: the detector, its trunk, and the labelled images that it is trained on."""

    loop: Literal["finetune"] = "finetune"
    """Which loop runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "finetune"
    """Name of the run; the same name with the same storage resumes the same run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, sample order, flips and sampled regions."""
    steps: Annotated[int, Field(ge=1)] = 90_000
    """Number of updates; COCO's 1x schedule has 90,000 of 16 images."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per update, over all workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of forward and backward."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two records of train/*."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, beside those at every evaluation, at a stop request and at the end; null: none by steps."""
    checkpoint_epochs: Annotated[int, Field(ge=1)] | None = 1
    """Epochs between checkpoints; null: no checkpoint at the end of an epoch."""
    allow_local_statistics: bool = False
    """Allow BatchNorm over each worker's share alone, by which each number of workers trains another model."""
    gradient_clip: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters; a longer one is scaled down to it; null: no clipping."""
    ledger: str | None = None
    """Local folder to which each worker writes the ids of the images of each step; null: none."""
    data: DataConfig
    boxes: str | None = None
    """Parquet file (path or URI) of objects that replace the dataset's own: image_id, x0, y0, x1, y1, score, category;
    half-open, in pixels of the upright source image; null: the dataset's own."""
    masks: str | None = None
    """COCO's panoptic json (path or URI) with its PNGs beside it: its things replace the dataset's objects, and Mask R-CNN
    learns their masks; null: boxes only."""
    class_agnostic: bool = False
    """Train with all categories merged into one."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the images with objects that is trained on; a smaller fraction's images are among a larger one's."""
    fraction_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of the fraction's images."""
    keep_empty: bool = False
    """Train on images without an object too."""
    trunk: ResNetTrunkConfig = RandomTrunkConfig()
    views: DetectionViewsConfig = DetectionViewsConfig()
    detector: DetectorConfig = DetectorConfig()
    optimizer: OptimizerConfig = SGDConfig(lr=0.01)
    schedule: DropScheduleConfig = DropScheduleConfig()
    evaluation: DetectionEvaluationConfig = DetectionEvaluationConfig()

    def __post_init__(self) -> None:
        needed, given = self.views.long_side, self.data.decode_size
        if given is not None and given < needed:
            raise ConfigError(
                f"data.decode_size: {given} is less than views.long_side={needed}, so images would be shrunk and enlarged again; "
                f"use at least {needed}, or null"
            )
        if self.boxes is not None and self.masks is not None:
            raise ConfigError("boxes: give either boxes or masks, which have objects of their own")
        if self.detector.kind == "mask_rcnn_fpn" and self.masks is None:
            raise ConfigError("masks: needed by detector.kind=mask_rcnn_fpn; give COCO's panoptic json")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """A dataset, the objects that a run is trained on, and its sample plan."""

    dataset: Dataset
    plan: SubsetPlan
    objects: dict[str, Objects]
    categories: tuple[str, ...]
    masks: PanopticMasks | None
    sha256: str  # of the dataset and, where given, of the file of boxes or masks

    @property
    def labels(self) -> dict[str, int]:
        """Category → label; 0 is torchvision's background."""
        return {name: label for label, name in enumerate(self.categories, start=1)}


def _open(settings: FinetuneConfig) -> _Labelled:
    dataset = open_dataset(settings.data.uri)
    masks = read_panoptic(settings.masks) if settings.masks is not None else None
    objects = read_objects(dataset, boxes=settings.boxes, masks=masks, class_agnostic=settings.class_agnostic)
    plan = SubsetPlan(
        dataset.row_groups.rows,
        select_images(objects, fraction=settings.fraction, seed=settings.fraction_seed, keep_empty=settings.keep_empty),
        dataset_sha256=dataset.manifest.sha256,
        seed=settings.seed,
        global_batch_size=settings.global_batch_size,
        lanes=settings.data.lanes,
    )
    return _Labelled(
        dataset=dataset,
        plan=plan,
        objects=objects,
        categories=category_names(dataset, objects, class_agnostic=settings.class_agnostic),
        masks=masks,
        sha256=_identity(dataset, settings.boxes or settings.masks),
    )


def _identity(dataset: Dataset, others: str | None) -> str:
    if others is None:
        return dataset.manifest.sha256
    filesystem, path = resolve_uri(others)
    return hashlib.sha256(dataset.manifest.sha256.encode() + read_bytes(filesystem, path)).hexdigest()


def preflight(settings: FinetuneConfig, world_size: int) -> Preflight:
    """Check all of a request that can be checked before it starts: keys, datasets, objects, the trunk.

    Raises:
        ConfigError, DataError: one sentence with the key or path.
    """
    labelled = _open(settings)
    if world_size > labelled.plan.lanes:
        raise ConfigError(
            f"scaling.num_workers: {world_size} workers are more than the {labelled.plan.lanes} lanes of the sample plan; "
            "use fewer workers, or a larger data.lanes (a divisor of global_batch_size)"
        )
    trunk = build_detector(settings, labelled.categories).network.backbone.trunk
    has_batch_norm = any(type(module) is nn.BatchNorm2d for module in trunk.modules())
    local = has_batch_norm and settings.detector.statistics == "batch"
    if world_size > 1 and local and not settings.allow_local_statistics:
        raise ConfigError(
            "detector.statistics: batch normalises over each worker's share, so another number of workers is another "
            "model; use frozen or sync_batch, or set allow_local_statistics=true"
        )
    held_out = open_dataset(settings.evaluation.uri) if settings.evaluation.uri else None
    if held_out is not None and not any(len(o.boxes_xyxy) for o in read_objects(held_out).values()):
        raise DataError(
            f"evaluation.uri: {settings.evaluation.uri} holds no objects; build it from a source with boxes"
        )
    return Preflight(
        manifest_sha256=labelled.sha256,
        config_sha256=config_hash(settings),
        num_images=labelled.plan.num_images,
        steps_per_epoch=labelled.plan.steps_per_epoch,
        lanes=labelled.plan.lanes,
        evaluation_manifest_sha256=held_out.manifest.sha256 if held_out else None,
    )


def build_detector(settings: FinetuneConfig, categories: tuple[str, ...]) -> Detector:
    """The detector that `settings` describe, on its trunk; its own layers are initialised from the run's seed.

    Raises:
        ConfigError: the trunk cannot be loaded.
    """
    trunk = load_resnet(settings.trunk)
    torch.manual_seed(stream(settings.seed, "detector"))  # the head is the same whatever the trunk took
    detector = Detector(settings.detector, trunk, categories)
    if isinstance(settings.trunk, CheckpointTrunkConfig) and settings.trunk.pyramid:
        detector.load_pyramid(load_pyramid(settings.trunk.uri))
    return detector


def load_detector(checkpoint: str, *, device: torch.device | str = "cpu") -> tuple[Detector, FinetuneConfig]:
    """The detector of a fine-tuning run's checkpoint (folder or s3:// address), in eval mode, and the run's config.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    filesystem, folder = resolve_uri(checkpoint)
    restored = read_checkpoint(folder, filesystem, device=device)
    settings = build(FinetuneConfig, parse_yaml(read_bytes(filesystem, f"{folder}/{CONFIG}").decode(), source=CONFIG))
    state = restored.state["model"]
    description = state["_extra_state"]  # the trunk's own source need not exist any more
    trunk = Trunk(build(BackboneConfig, description["backbone"]))
    detector = Detector(settings.detector, trunk, tuple(description["categories"]))
    detector.load_state_dict(state)
    return detector.to(device).eval(), settings


def finetune(settings: FinetuneConfig, runtime: Runtime) -> dict[str, float]:
    """Start or resume the run that `settings` describe; returns the last evaluation's figures and `train/loss`.

    Raises:
        ConfigError, DataError: the request cannot work.
        CheckpointError: the newest checkpoint belongs to another config or dataset, or is damaged.
        NonFiniteLossError: the loss is NaN or infinite.
        RunStoppedError: the run was requested to stop.
    """
    labelled = _open(settings)
    torch.manual_seed(settings.seed)
    detector = build_detector(settings, labelled.categories).to(memory_format=torch.channels_last)
    model = runtime.prepare(detector)
    optimizer = make_optimizer(detector, settings.optimizer)
    evaluation = _evaluation(settings, labelled, runtime)
    objects = LabelledObjects(objects=labelled.objects, labels=labelled.labels, masks=labelled.masks)

    def update(batch: ImageBatch, step: int) -> dict[str, Tensor]:
        views = make_detection_views(
            batch,
            settings.views,
            device=runtime.device,
            labelled=objects,
            seed=settings.seed,
        )
        # Sampled regions depend on the step and the rank alone: a resumed run draws the same.
        torch.manual_seed(stream(settings.seed, "regions", step, runtime.rank))
        return _update(model, optimizer, views, settings)

    training = Training(
        model=detector,
        optimizer=optimizer,
        loader=TrainLoader(
            labelled.dataset, labelled.plan, settings.data, rank=runtime.rank, world_size=runtime.world_size
        ),
        identity=CheckpointMeta(step=0, config_sha256=config_hash(settings), manifest_sha256=labelled.sha256),
        rate=lambda step: settings.optimizer.lr * dropped_rate_at(step, settings.steps, settings.schedule),
        update=update,
        evaluate=None if evaluation is None else lambda step: evaluation.run(detector, step=step),
        remedy="lower optimizer.lr or set gradient_clip",
    )
    return run_steps(training, settings, runtime)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: DetectionViews,
    settings: FinetuneConfig,
) -> dict[str, Tensor]:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(views.images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        result = model(views)
    result.loss.backward()
    if settings.gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
    optimizer.step()
    return dict(result.metrics)


def _evaluation(settings: FinetuneConfig, labelled: _Labelled, runtime: Runtime) -> DetectionEvaluation | None:
    if settings.evaluation.uri is None:
        return None
    return _evaluation_of(settings, settings.evaluation.uri, labelled.categories, runtime)


def _evaluation_of(
    settings: FinetuneConfig, uri: str, categories: tuple[str, ...], runtime: Runtime
) -> DetectionEvaluation:
    return DetectionEvaluation(
        settings.evaluation,
        open_dataset(uri),
        views=settings.views,
        reading=settings.data,
        categories=categories,
        class_agnostic=settings.class_agnostic,
        runtime=runtime,
    )


def evaluate_detector(checkpoint: str, *, settings: DetectionEvaluationConfig, runtime: Runtime) -> dict[str, float]:
    """Measure a fine-tuning run's checkpoint as `settings` say, and report it at its step.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: `settings` name no dataset.
        DataError: there is no dataset at the address.
    """
    if settings.uri is None:
        raise ConfigError("evaluation.uri: name a dataset to evaluate on")
    detector, trained = load_detector(checkpoint, device=runtime.device)
    run = dataclasses.replace(trained, evaluation=settings)
    evaluation = _evaluation_of(run, settings.uri, detector.categories, runtime)
    return evaluation.run(detector, step=read_meta(checkpoint).step)
