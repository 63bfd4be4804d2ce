"""The configuration of `orchestrator discover`: `DiscoverExperiment` and its loading."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from orchestrator.experiments.load import absolute_uri, check_lasting, with_absolute_paths
from workloads.config import apply_overrides, build, config, parse_overrides, read_yaml
from workloads.errors import ConfigError
from workloads.loops.discovery.job import DiscoverConfig
from workloads.models.trunks import VitTrunkConfig


@config
class ActorsConfig:
    """Number and resources of the actors."""

    num_workers: PositiveInt = 1
    """Number of actors; each loads its own copy of the networks."""
    cpus_per_worker: PositiveInt = 1
    """Ray CPUs of each actor, and its number of torch threads."""
    use_gpu: bool = False
    """Give each actor one GPU."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Nice level of the actors, 0 to 19. Ray's own default, 15, makes them yield to every other process of the machine."""


@config
class RecordConfig:
    """The MLflow run of the discovery."""

    uri: str | None = None
    """MLflow tracking URI; null: the value of MLFLOW_TRACKING_URI, else SQLite beside the output folder."""
    experiment: str = "discovery"
    """MLflow experiment of the run."""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """Name of the run; null: the name of the first method and the beginning of the hash of the request."""


@config
class DiscoverExperiment(DiscoverConfig):
    """A discovery with its output, resources and MLflow run."""

    output: str = "runs/discovery"
    """Destination of boxes, figures and unfinished parts: a folder that all nodes share, or s3://bucket/prefix."""
    scaling: ActorsConfig = ActorsConfig()
    tracking: RecordConfig = RecordConfig()

    @property
    def science(self) -> DiscoverConfig:
        """The part that determines the boxes and their figures."""
        return DiscoverConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DiscoverConfig)})


def load_discovery(arguments: Sequence[str]) -> DiscoverExperiment:
    """Read the YAML file, if the arguments name one, apply the `key=value` arguments, and make local paths absolute.

    Raises:
        ConfigError: one sentence with the dotted key and the fix.
    """
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: expected key=value; only one YAML file can be given")
    data = read_yaml(files[0]) if files else {}
    data = apply_overrides(data, parse_overrides([argument for argument in arguments if "=" in argument]))
    if "uri" not in data:
        raise ConfigError("uri: name the dataset, as uri=FOLDER")
    settings = with_absolute_paths(build(DiscoverExperiment, data))
    check_lasting("output", settings.output)
    changes: dict[str, Any] = {"output": absolute_uri(settings.output)}
    if settings.detector is not None:
        changes["detector"] = absolute_uri(settings.detector)
    match settings.trunk:
        case VitTrunkConfig(vit=vit) if vit.weights not in ("none", "timm"):
            vit = dataclasses.replace(vit, weights=absolute_uri(vit.weights))
            changes["trunk"] = dataclasses.replace(settings.trunk, vit=vit)
    return dataclasses.replace(settings, **changes)
