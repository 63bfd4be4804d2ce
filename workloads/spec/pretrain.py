"""What a run is: the sections of an experiment file, and the one place where a `kind` becomes an object."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from workloads.config import apply_overrides, build, config, read_yaml
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
"""Sections of an experiment file that say where it runs, not what; a run without Ray and MLflow skips them."""


@config
class EvaluationConfig:
    """What is measured on held-out images, and when."""

    uri: str | None = None
    """Dataset of held-out images, a folder or s3:// address with a manifest.json; null: no evaluation."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations during training; null: none but at the start and at the end."""
    at_start: bool = True
    """Whether the untrained model is measured, at step 0."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per evaluation batch of one worker; changes speed and memory, not figures."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Evaluate only this many images, the first in the dataset's order."""
    heatmaps: Annotated[int, Field(ge=0)] = 6
    """Images shown in each heatmap figure; 0 for none."""
    protocol: GridAccuracyConfig = GridAccuracyConfig()
    representation: RepresentationConfig | None = None
    """What nearest neighbours and a linear probe make of the trunk's features; null: not measured."""


@config
class PretrainConfig:
    """A pretraining run."""

    loop: Literal["pretrain"] = "pretrain"
    """Which loop runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "pretrain"
    """Name of the run: the same name and storage continue the same run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, sample order and views."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Updates in the whole run."""
    global_batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per update, over all workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of forward and backward; the loss stays in float32."""
    channels_last: bool = True
    """Keep images and kernels in NHWC memory, which convolutions prefer on CPUs and tensor cores."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two records of train/*."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; there is one at every evaluation, at the end, and when the run is told to stop, too."""
    checkpoint_epochs: Annotated[int, Field(ge=1)] | None = 1
    """Epochs between checkpoints; null: none at the end of an epoch."""
    init_from: str | None = None
    """Folder or s3:// address of a checkpoint whose networks this run starts from; nothing else of it is continued."""
    trunk_from: str | None = None
    """Folder or s3:// address of a checkpoint, of any objective, whose trunk this run starts from; the rest starts afresh."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images of a worker that have a graph in memory at a time (gradient caching: the same loss and gradients, a forward
    pass more); null: the worker's whole share. Needs backbone.norm=group."""
    allow_local_statistics: bool = False
    """Let BatchNorm see a worker's share or a micro-batch only, which makes each number of workers another model."""
    ledger: str | None = None
    """Local folder in which each worker lists the images that it trained on, step by step; null: no list."""
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
            raise ConfigError("trunk_from: init_from brings the trunk too; give one of them")
        if self.micro_batch_size is not None and self.backbone.norm == "sync_batch":
            raise ConfigError("micro_batch_size: sync_batch needs the whole batch at once; use backbone.norm=group")
        if self.micro_batch_size is not None and self.backbone.norm == "batch" and not self.allow_local_statistics:
            raise ConfigError(
                "micro_batch_size: batch would normalise over each micro-batch, which is another model; "
                "use backbone.norm=group, or say allow_local_statistics=true"
            )

    def _check_objective(self) -> None:
        """See that views and backbone are such as the objective can use."""
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


def load_pretrain(path: str | Path, overrides: dict[str, Any]) -> PretrainConfig:
    """An experiment file and dotted overrides as a run without Ray and MLflow.

    Raises:
        ConfigError: one sentence naming the key.
    """
    data = {key: value for key, value in read_yaml(path).items() if key not in ORCHESTRATOR_SECTIONS}
    return build(PretrainConfig, apply_overrides(data, overrides))
