"""Defines `PretrainConfig`, the sections of a pretraining experiment file, and checks that they fit together."""

from typing import Annotated, Literal

from pydantic import Field

from workloads.config import config
from workloads.data.loading.pipeline import DataConfig
from workloads.data.views.crops import ViewsConfig
from workloads.data.views.pairs import PairViewsConfig
from workloads.errors import ConfigError
from workloads.metrics.grid_accuracy import GridAccuracyConfig
from workloads.metrics.representation import RepresentationConfig
from workloads.models.backbone import BackboneConfig
from workloads.objectives.anchor_ntxent import AnchorNTXentConfig
from workloads.objectives.detco import DetCoConfig
from workloads.objectives.detcon import DetConConfig
from workloads.objectives.ntxent import NTXentConfig
from workloads.spec.optim import AdamWConfig, OptimizerConfig, ScheduleConfig

ORCHESTRATOR_SECTIONS = ("scaling", "tracking", "storage", "failure", "sweep")
"""Sections of an experiment file about where it runs; `python -m workloads` ignores them."""


@config
class EvaluationConfig:
    """Evaluations on held-out images: datasets, times and protocols."""

    uri: str | None = None
    """Dataset of held-out images for grid accuracy, a folder or s3:// address with a manifest.json; null: not measured."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations during training; null: only at the start and at the end."""
    at_start: bool = True
    """Evaluate the untrained model too, at step 0."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per evaluation batch of one worker; changes speed and memory, not figures."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Evaluate only this many images, the first in the dataset's order; null: all."""
    heatmaps: Annotated[int, Field(ge=0)] = 6
    """Images drawn in each heatmap figure; 0: no figure."""
    protocol: GridAccuracyConfig = GridAccuracyConfig()
    representation: RepresentationConfig | None = None
    """Classification by the trunk's frozen features (nearest neighbours, linear probe); null: not measured."""


@config
class PretrainConfig:
    """A pretraining run."""

    loop: Literal["pretrain"] = "pretrain"
    """Which loop runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "pretrain"
    """Name of the run; the same name with the same storage resumes the same run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, sample order and views."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Number of updates."""
    global_batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per update, over all workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of forward and backward; the loss stays in float32."""
    channels_last: bool = True
    """Keep images and kernels in NHWC memory, which convolutions prefer on CPUs and tensor cores."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two records of train/*."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, beside those at every evaluation, at a stop request and at the end; null: none by steps."""
    checkpoint_epochs: Annotated[int, Field(ge=1)] | None = 1
    """Epochs between checkpoints; null: no checkpoint at the end of an epoch."""
    init_from: str | None = None
    """Folder or s3:// address of a checkpoint whose weights this run starts from, at step 0; null: none."""
    trunk_from: str | None = None
    """Folder or s3:// address of a checkpoint, of any objective, whose trunk this run starts from; null: none."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images of a worker whose graph is in memory at a time (gradient caching: the same loss and gradients for one more
    forward pass); null: all of the worker's share. Needs backbone.norm=group."""
    allow_local_statistics: bool = False
    """Allow BatchNorm over each worker's share or micro-batch alone, by which each number of workers trains another model."""
    ledger: str | None = None
    """Local folder to which each worker writes the ids of the images of each step; null: none."""
    data: DataConfig
    views: Annotated[ViewsConfig | PairViewsConfig, Field(discriminator="kind")] = ViewsConfig()
    backbone: BackboneConfig = BackboneConfig()
    objective: Annotated[
        AnchorNTXentConfig | NTXentConfig | DetConConfig | DetCoConfig, Field(discriminator="kind")
    ] = AnchorNTXentConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if self.backbone.weights == "imagenet" and self.backbone.norm != "batch":
            raise ConfigError("backbone.weights: ImageNet weights come with backbone.norm=batch only")
        self._check_objective()
        if self.init_from is not None and self.trunk_from is not None:
            raise ConfigError("trunk_from: give either trunk_from or init_from, which sets the trunk too")
        if self.micro_batch_size is not None and self.backbone.norm == "sync_batch":
            raise ConfigError(
                "micro_batch_size: sync_batch normalises over all of the batch at once; use backbone.norm=group"
            )
        if self.micro_batch_size is not None and self.backbone.norm == "batch" and not self.allow_local_statistics:
            raise ConfigError(
                "micro_batch_size: batch would normalise over each micro-batch, which is another model; "
                "use backbone.norm=group, or set allow_local_statistics=true"
            )

    def _check_objective(self) -> None:
        """Check that views and backbone fit the objective."""
        objective, views = self.objective, self.views
        wanted = "crops" if isinstance(objective, AnchorNTXentConfig) else "pair"
        if views.kind != wanted:
            raise ConfigError(
                f"views.kind: {objective.kind} needs {wanted}, given {views.kind}; set views.kind={wanted}"
            )
        if self.backbone.is_vit and not isinstance(objective, NTXentConfig):
            raise ConfigError(
                f"backbone.name: {objective.kind} needs the stages of a ResNet, which {self.backbone.name} lacks; use "
                "resnet18, resnet34 or resnet50, or objective.kind=ntxent"
            )
        if self.backbone.frozen and not (isinstance(objective, AnchorNTXentConfig) and objective.shared_trunk):
            raise ConfigError(
                "backbone.frozen: only a pyramid can be trained on a frozen trunk; use objective.kind=anchor_ntxent with "
                "objective.shared_trunk=true"
            )
        match objective, views:
            case AnchorNTXentConfig(), ViewsConfig():
                objective.check_views(views.full_size)
            case DetConConfig(), PairViewsConfig(regions=None):
                raise ConfigError("views.regions: detcon needs regions; set views.regions.kind=grid, or column")
            case DetCoConfig(), PairViewsConfig(patches=None):
                raise ConfigError("views.patches: detco needs patches; set views.patches.size=64")
            case DetCoConfig(), _ if objective.queue_size % self.global_batch_size:
                raise ConfigError(
                    f"objective.queue_size: {objective.queue_size} is no multiple of global_batch_size="
                    f"{self.global_batch_size}"
                )
