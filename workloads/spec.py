"""What a run is: the sections of an experiment file, and the one place where a `kind` becomes an object."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from workloads.checkpoint import CONFIG, CheckpointError, read_checkpoint
from workloads.config import ConfigError, apply_overrides, build, config, read_yaml
from workloads.data.filesystems import DataError, resolve_uri
from workloads.data.reader import DataConfig
from workloads.data.views import ViewsConfig
from workloads.metrics.grid_accuracy import GridAccuracyConfig
from workloads.models.backbone import BackboneConfig
from workloads.objectives.anchor_ntxent import AnchorNTXent, AnchorNTXentConfig
from workloads.optim import AdamWConfig, OptimizerConfig, ScheduleConfig

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
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images of a worker that have a graph in memory at a time (gradient caching: the same loss and gradients, a forward
    pass more); null: the worker's whole share. Needs backbone.norm=group."""
    allow_local_statistics: bool = False
    """Let BatchNorm see a worker's share or a micro-batch only, which makes each number of workers another model."""
    ledger: str | None = None
    """Local folder in which each worker lists the images that it trained on, step by step; null: no list."""
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    backbone: BackboneConfig = BackboneConfig()
    objective: AnchorNTXentConfig = AnchorNTXentConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if self.backbone.weights == "imagenet" and self.backbone.norm != "batch":
            raise ConfigError("backbone.weights: ImageNet weights come with backbone.norm=batch only")
        self.objective.check_views(self.views.full_size)
        if self.micro_batch_size is not None and self.backbone.norm == "sync_batch":
            raise ConfigError("micro_batch_size: sync_batch needs the whole batch at once; use backbone.norm=group")
        if self.micro_batch_size is not None and self.backbone.norm == "batch" and not self.allow_local_statistics:
            raise ConfigError(
                "micro_batch_size: batch would normalise over each micro-batch, which is another model; "
                "use backbone.norm=group, or say allow_local_statistics=true"
            )


def build_objective(settings: PretrainConfig, *, seed: int | None = None) -> AnchorNTXent:
    """The objective with its networks, freshly initialised from the global RNG.

    Args:
        seed: of the draws inside the objective; the run's own by default.
    """
    match settings.objective:
        case AnchorNTXentConfig():
            return AnchorNTXent(
                settings.objective,
                settings.backbone,
                crop_size=settings.views.crop_size,
                seed=settings.seed if seed is None else seed,
            )


def load_initial_weights(objective: torch.nn.Module, uri: str, *, device: torch.device) -> None:
    """Start `objective` from the networks of the checkpoint at `uri`.

    Raises:
        ConfigError: no checkpoint there, a damaged one, or one of other networks.
    """
    try:
        filesystem, folder = resolve_uri(uri)
        state = read_checkpoint(folder, filesystem, device=device).state["model"]
        objective.load_state_dict(state)
    except (CheckpointError, DataError, OSError) as error:
        raise ConfigError(f"init_from: {error}") from None
    except RuntimeError as error:  # torch lists the names on lines of their own
        differences = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(
            f"init_from: {uri} holds other networks than this configuration ({differences[:300]})"
        ) from None


def load_pretrain(path: str | Path, overrides: dict[str, Any]) -> PretrainConfig:
    """An experiment file and dotted overrides as a run without Ray and MLflow.

    Raises:
        ConfigError: one sentence naming the key.
    """
    data = {key: value for key, value in read_yaml(path).items() if key not in ORCHESTRATOR_SECTIONS}
    return build(PretrainConfig, apply_overrides(data, overrides))


def load_model(checkpoint: Path, *, device: torch.device | str = "cpu") -> tuple[AnchorNTXent, PretrainConfig]:
    """The networks of a checkpoint, in eval mode, and the run's config.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    settings = build(PretrainConfig, read_yaml(checkpoint / CONFIG))
    model = build_objective(settings).to(device)
    model.load_state_dict(read_checkpoint(str(checkpoint), device=device).state["model"])
    return model.eval(), settings
