"""The configuration of a run: `TrainExperiment` and `FinetuneExperiment`, which add to a loop's config where and how it runs."""

import dataclasses
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from workloads.config import config
from workloads.errors import ConfigError
from workloads.loops.finetune import FinetuneConfig
from workloads.spec.pretrain import PretrainConfig


@config
class ScalingConfig:
    """Number, resources and timeouts of the workers."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training processes, which divide the global batch: a number, or [fewest, most] to follow the size of the cluster."""

    cpus_per_worker: PositiveInt = 2
    """Ray CPUs reserved for each worker."""

    threads_per_worker: PositiveInt | None = None
    """Torch and OpenMP threads of each worker; null: cpus_per_worker."""

    use_gpu: bool = False
    """Give each worker one GPU."""

    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Nice level of the workers, 0 to 19. Ray's default is 15, with which other processes of the machine come first."""

    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Placement of the workers: on few nodes, on many nodes, or strictly one worker on each node."""

    fast_start: bool | None = None
    """Save seconds at the start and after a fault by private interfaces of Ray: standby processes with their imports done, no
    controller process for a trial of a sweep, fewer helper processes. null: yes on a local Ray and on clusters that
    `cluster up` or files of `cluster render` started, no elsewhere; never with a release of Ray that was not tested."""

    start_timeout_s: PositiveFloat = 60.0
    """Longest wait for the workers' resources and start, seconds; then the attempt has failed."""

    poll_interval_s: PositiveFloat = 0.5
    """Interval at which the controller polls the workers for reports and health, seconds."""

    resize_check_s: PositiveFloat = 10.0
    """Interval at which a run with [fewest, most] workers checks whether more of them fit, seconds."""

    hang_timeout_s: PositiveFloat = 600.0
    """Longest time in which a worker neither finishes a step nor dies, seconds; then it counts as hung and is replaced."""

    def __post_init__(self) -> None:
        if self.fewest_workers > self.most_workers:
            raise ConfigError(f"scaling.num_workers: expected [fewest, most], given {list(self._range)}")

    @property
    def _range(self) -> tuple[int, int]:
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def fewest_workers(self) -> int:
        """Least workers; the run waits until they fit."""
        return self._range[0]

    @property
    def most_workers(self) -> int:
        """Most workers."""
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
    """Where and what MLflow records of the run."""

    uri: str | None = None
    """MLflow tracking URI; null: the variable MLFLOW_TRACKING_URI, else an SQLite file in the output folder."""

    experiment: str = "pretraining"
    """MLflow experiment of the run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """Name and identity of the run: the same name continues the same run; null: the experiment's name and the hash of its config."""

    system_metrics: bool = True
    """Record CPU, memory and network of the driver's machine, and on a cluster CPU and memory of the workers' nodes."""

    log_model: bool = True
    """Log the trained model to the run when it ends."""


@config
class StorageConfig:
    """Where checkpoints and artifacts are stored, and which checkpoints stay."""

    path: Annotated[str, Field(min_length=1)] = "runs"
    """Output folder: a local folder (on a cluster, one that all nodes share) or s3://bucket/prefix."""

    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay; older ones are deleted."""

    best_metric: str | None = "eval/sga"
    """Metric whose highest value marks a checkpoint that stays too; null: only the newest stay."""


@config
class FailureConfig:
    """How often and how long a run is retried after a failure."""

    retries: NonNegativeInt = 3
    """Most attempts in a row that fail without progress beyond the newest checkpoint; a fault that would repeat is not retried."""

    patience_s: PositiveFloat = 600.0
    """Longest outage of the object store, Ray's control processes or a lost node that the run waits out, seconds."""

    grace_s: PositiveFloat = 30.0
    """Longest time for the last step and checkpoint after SIGTERM, seconds; then the run ends without them. Give at most the grace
    period of whatever sends the signal (30 for a Kubernetes pod). A second SIGTERM ends the run at once."""

    spare_processes: bool = True
    """Keep a standby process beside each worker, with its imports done, where `scaling.fast_start` holds. It replaces a dead worker,
    or becomes the next trial of a sweep. Each takes half a gigabyte of memory."""


@config
class TrainExperiment(PretrainConfig):
    """A complete pretraining experiment, as a file of `experiments/` with overrides describes it."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    failure: FailureConfig = FailureConfig()

    @property
    def more_places(self) -> dict[str, str | None]:
        """Dotted key → URI that a derived experiment reads beside those of a run."""
        return {}

    @property
    def science(self) -> PretrainConfig:
        """The part that determines the result, without where it runs; its hash identifies the run."""
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})


@config
class FinetuneExperiment(FinetuneConfig):
    """A complete fine-tuning experiment, with the same sections for where and how it runs."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig(experiment="finetuning")
    storage: StorageConfig = StorageConfig(best_metric="eval/ap50")
    failure: FailureConfig = FailureConfig()

    @property
    def science(self) -> FinetuneConfig:
        """The part that determines the result, without where it runs; its hash identifies the run."""
        names = [field.name for field in dataclasses.fields(FinetuneConfig)]
        return FinetuneConfig(**{name: getattr(self, name) for name in names})


AnyExperiment: TypeAlias = TrainExperiment | FinetuneExperiment


def places_read(experiment: AnyExperiment) -> dict[str, str]:
    """Dotted key → URI of every dataset, checkpoint and file that a run reads."""
    places: dict[str, str | None] = {"data.uri": experiment.data.uri, "evaluation.uri": experiment.evaluation.uri}
    match experiment:
        case TrainExperiment():
            places |= {"init_from": experiment.init_from, "trunk_from": experiment.trunk_from, **experiment.more_places}
            if (representation := experiment.evaluation.representation) is not None:
                places["evaluation.representation.train_uri"] = representation.train_uri
                places["evaluation.representation.test_uri"] = representation.test_uri
        case FinetuneExperiment():
            places |= {
                "boxes": experiment.boxes,
                "masks": experiment.masks,
                "evaluation.masks": experiment.evaluation.masks,
            }
            places |= {f"trunk.{name}": getattr(experiment.trunk, name, None) for name in ("uri", "file")}
    return {key: uri for key, uri in places.items() if uri is not None}


EXPERIMENTS: dict[str, type[TrainExperiment] | type[FinetuneExperiment]] = {
    "pretrain": TrainExperiment,
    "finetune": FinetuneExperiment,
}
"""Loop → class of its experiments."""


def command_of(experiment: AnyExperiment) -> str:
    """The subcommand that runs the experiment."""
    return "train" if experiment.loop == "pretrain" else experiment.loop
