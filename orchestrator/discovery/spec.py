"""The configuration of `orchestrator discover`: `DiscoverExperiment` and its loading."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from orchestrator.experiments.load import absolute_uri
from workloads.config import apply_overrides, build, config, parse_overrides, read_yaml
from workloads.errors import ConfigError
from workloads.loops.discovery.job import DiscoverConfig, MatchConfig
from workloads.models.trunks import CheckpointTrunkConfig, SupervisedTrunkConfig, VitTrunkConfig


@config
class ActorsConfig:
    """How many actors look at images, and what each of them gets."""

    num_workers: PositiveInt = 1
    """Actors, each with networks of its own."""
    cpus_per_worker: PositiveInt = 1
    """Ray CPUs that each actor holds, and its torch threads."""
    use_gpu: bool = False
    """Give each actor one GPU."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Nice level of the actors. Ray's own default, 15, makes them yield to anything else on the machine."""


@config
class RecordConfig:
    """Where the record of the discovery is kept."""

    uri: str | None = None
    """MLflow tracking URI; null: the MLFLOW_TRACKING_URI variable, else SQLite beside the output folder."""
    experiment: str = "discovery"
    """MLflow experiment that the run is listed under."""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """Name of the run; null: the first method's, and the beginning of the request's hash."""


@config
class DiscoverExperiment(DiscoverConfig):
    """A discovery, and where and how it runs."""

    output: str = "runs/discovery"
    """Where boxes, figures and the parts on their way go: a folder that all nodes share, or s3://bucket/prefix."""
    scaling: ActorsConfig = ActorsConfig()
    tracking: RecordConfig = RecordConfig()

    @property
    def science(self) -> DiscoverConfig:
        """The part that decides the boxes and their figures."""
        return DiscoverConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DiscoverConfig)})


def load_discovery(arguments: Sequence[str]) -> DiscoverExperiment:
    """A YAML file, if the first argument is one, and dotted overrides; local paths made absolute.

    Raises:
        ConfigError: one sentence with the dotted key and how to mend it.
    """
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: expected key=value, after one YAML file at most")
    data = read_yaml(files[0]) if files else {}
    data = apply_overrides(data, parse_overrides([argument for argument in arguments if "=" in argument]))
    if "uri" not in data:
        raise ConfigError("uri: name the dataset to look at, as uri=FOLDER")
    found = build(DiscoverExperiment, data)
    changes: dict[str, Any] = {"uri": absolute_uri(found.uri), "output": absolute_uri(found.output)}
    for name in ("file", "detector"):
        if (path := getattr(found, name)) is not None:
            changes[name] = absolute_uri(path)
    if found.match.boxes is not None and found.match.uri is not None:
        changes["match"] = MatchConfig(boxes=absolute_uri(found.match.boxes), uri=absolute_uri(found.match.uri))
    match found.trunk:
        case SupervisedTrunkConfig(file=str(file)):
            changes["trunk"] = dataclasses.replace(found.trunk, file=absolute_uri(file))
        case CheckpointTrunkConfig(uri=uri):
            changes["trunk"] = dataclasses.replace(found.trunk, uri=absolute_uri(uri))
        case VitTrunkConfig(vit=vit) if vit.weights not in ("none", "timm"):
            vit = dataclasses.replace(vit, weights=absolute_uri(vit.weights))
            changes["trunk"] = dataclasses.replace(found.trunk, vit=vit)
    return dataclasses.replace(found, **changes)
