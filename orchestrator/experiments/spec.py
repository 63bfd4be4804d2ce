"""A complete experiment: what `workloads` trains, and where and how it runs."""

import dataclasses
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from workloads.config import config
from workloads.errors import ConfigError
from workloads.loops.finetune import FinetuneConfig
from workloads.spec.pretrain import PretrainConfig


@config
class ScalingConfig:
    """How many workers train, and what each of them gets."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training processes, among which the global batch is divided: a number, or [fewest, most] to follow the cluster's size."""

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

    fast_start: bool | None = None
    """Save seconds at a start and after a fault by means that Ray does not document: processes started and their imports done
    ahead, no controller process for a sweep's trial, fewer helper processes. null: for a local Ray, and on a cluster whose
    nodes `cluster up` or the files of `cluster render` started; with a Ray that they were not tested with, never."""

    start_timeout_s: PositiveFloat = 60.0
    """How long the workers may take to get their CPUs and start, seconds."""

    poll_interval_s: PositiveFloat = 0.5
    """How often the controller asks the workers for reports and signs of life, seconds."""

    resize_check_s: PositiveFloat = 10.0
    """How often a run with [fewest, most] workers looks whether there is room for more of them, seconds."""

    hang_timeout_s: PositiveFloat = 600.0
    """How long a worker may neither finish a step nor die before it is taken for hung and the run continued without it."""

    def __post_init__(self) -> None:
        if self.fewest_workers > self.most_workers:
            raise ConfigError(f"scaling.num_workers: expected [fewest, most], given {list(self._range)}")

    @property
    def _range(self) -> tuple[int, int]:
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def fewest_workers(self) -> int:
        """The run waits until there is room for so many."""
        return self._range[0]

    @property
    def most_workers(self) -> int:
        """The run never has more."""
        return self._range[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.fewest_workers < self.most_workers

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
    """Record CPU, memory and network of the driver's machine, and on a cluster CPU and memory of each worker's node."""

    log_model: bool = True
    """Keep the trained model with the run when it ends."""


@config
class StorageConfig:
    """Where checkpoints and artifacts are kept."""

    path: Annotated[str, Field(min_length=1)] = "runs"
    """Output folder: a local folder (shared by all nodes, where there are several) or s3://bucket/prefix."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay; older ones are deleted."""

    best_metric: str | None = "eval/sga"
    """The checkpoint with the highest value of this metric stays too; null: only the newest stay."""


@config
class FailureConfig:
    """How long a run goes on trying."""

    retries: NonNegativeInt = 3
    """How often a failed attempt is continued from its newest checkpoint without getting any further; what would fail the
    same way again is never retried."""

    patience_s: PositiveFloat = 600.0
    """How long the object store, the cluster's control processes or a lost node may stay away, seconds."""

    grace_s: PositiveFloat = 30.0
    """How long a run that SIGTERM asked to end may take for its last step and checkpoint until it is ended without, seconds;
    at most the grace period of whoever sends the signal (30 for a Kubernetes pod). A second SIGTERM ends the run at once."""

    spare_processes: bool = True
    """Where scaling.fast_start holds: keep a standby process beside each worker, started and its imports done, which takes over
    when the worker dies, or which the next trial of a sweep begins with; each holds half a gigabyte."""


@config
class TrainExperiment(PretrainConfig):
    """One complete, runnable experiment: a file under `experiments/` plus overrides."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    failure: FailureConfig = FailureConfig()

    @property
    def science(self) -> PretrainConfig:
        """The part that decides the result; its hash is the run's identity, and it says nothing of where it ran."""
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})


@config
class FinetuneExperiment(FinetuneConfig):
    """One complete, runnable fine-tuning experiment: its loop is another, all that runs it is the same."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig(experiment="finetuning")
    storage: StorageConfig = StorageConfig(best_metric="eval/ap50")
    failure: FailureConfig = FailureConfig()

    @property
    def science(self) -> FinetuneConfig:
        """The part that decides the result; its hash is the run's identity, and it says nothing of where it ran."""
        names = [field.name for field in dataclasses.fields(FinetuneConfig)]
        return FinetuneConfig(**{name: getattr(self, name) for name in names})


AnyExperiment: TypeAlias = TrainExperiment | FinetuneExperiment


def places_read(experiment: AnyExperiment) -> dict[str, str]:
    """Dotted key → URI of everything that a run reads."""
    found: dict[str, str | None] = {"data.uri": experiment.data.uri, "evaluation.uri": experiment.evaluation.uri}
    match experiment:
        case TrainExperiment():
            found |= {"init_from": experiment.init_from, "trunk_from": experiment.trunk_from}
        case FinetuneExperiment():
            found |= {
                "boxes": experiment.boxes,
                "masks": experiment.masks,
                "evaluation.masks": experiment.evaluation.masks,
            }
            found |= {f"trunk.{name}": getattr(experiment.trunk, name, None) for name in ("uri", "file")}
    return {key: uri for key, uri in found.items() if uri is not None}


EXPERIMENTS: dict[str, type[TrainExperiment] | type[FinetuneExperiment]] = {
    "pretrain": TrainExperiment,
    "finetune": FinetuneExperiment,
}
"""Loop → the experiments that run it."""


def command_of(experiment: AnyExperiment) -> str:
    """The command that runs an experiment of this loop."""
    return "train" if experiment.loop == "pretrain" else experiment.loop
