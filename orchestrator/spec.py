"""A complete experiment: what `workloads` trains, and where and how it runs."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from workloads.config import config
from workloads.spec import PretrainConfig


@config
class ScalingConfig:
    """How many workers train, and what each of them gets."""

    num_workers: PositiveInt = 1
    """Training processes; the global batch is divided among them."""

    cpus_per_worker: PositiveInt = 2
    """Ray CPUs that each worker holds."""

    threads_per_worker: PositiveInt | None = None
    """Torch and OpenMP threads of each worker; null: as many as cpus_per_worker."""

    use_gpu: bool = False
    """Give each worker one GPU."""

    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Nice level of the workers. Ray's own default, 15, makes them yield to anything else on the machine."""

    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How workers are laid over nodes: few nodes, many nodes, or strictly one worker a node."""

    start_timeout_s: PositiveFloat = 60.0
    """How long the workers may take to get their CPUs and start, seconds."""

    poll_interval_s: PositiveFloat = 0.5
    """How often the controller asks the workers for reports and signs of life, seconds."""

    @property
    def threads(self) -> int:
        """Torch threads of one worker."""
        return self.threads_per_worker or self.cpus_per_worker


@config
class TrackingConfig:
    """Where the record of the run is kept."""

    uri: str | None = None
    """MLflow tracking URI; null: the MLFLOW_TRACKING_URI variable, else SQLite in the output folder."""

    experiment: str = "pretraining"
    """MLflow experiment that the run is listed under."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """The run's identity: the same name continues the same run; null: the experiment's name and its config's hash."""

    system_metrics: bool = True
    """Record CPU, memory and network of the driver's machine."""

    log_model: bool = True
    """Keep the trained model with the run when it ends."""


@config
class StorageConfig:
    """Where checkpoints and artifacts are kept."""

    path: Annotated[str, Field(min_length=1)] = "runs"
    """Output folder: a local folder (shared by all nodes, where there are several) or s3://bucket/prefix."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay; older ones are deleted."""


@config
class TrainExperiment(PretrainConfig):
    """One complete, runnable experiment: a file under `experiments/` plus overrides."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    retries: NonNegativeInt = 2
    """How often a failed attempt is continued from its last checkpoint; a fault in the request is never retried."""

    @property
    def science(self) -> PretrainConfig:
        """The part that decides the result; its hash is the run's identity, and it says nothing of where it ran."""
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})
