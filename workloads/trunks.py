"""Where a detector's trunk comes from: a pretraining run's checkpoint, torchvision's supervised weights, or nowhere."""

from typing import Annotated, Any, Literal

import torch
import torchvision
from pydantic import Field

from workloads.checkpoint import CheckpointError
from workloads.config import ConfigError, config
from workloads.data.filesystems import DataError, resolve_uri
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.spec import load_trunk


@config
class RandomTrunkConfig:
    """Freshly initialised, from the run's seed."""

    kind: Literal["random"] = "random"
    """Which trunk."""
    backbone: BackboneConfig = BackboneConfig()

    def __post_init__(self) -> None:
        if self.backbone.is_vit:
            raise ConfigError("trunk.backbone.name: the detectors stand on a ResNet")


@config
class CheckpointTrunkConfig:
    """The full view's trunk of a pretraining run."""

    kind: Literal["checkpoint"] = "checkpoint"
    """Which trunk."""
    uri: str
    """Folder or s3:// address of a checkpoint (RUN/checkpoints/step_…)."""


@config
class SupervisedTrunkConfig:
    """torchvision's supervised ImageNet weights."""

    kind: Literal["supervised"] = "supervised"
    """Which trunk."""
    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """Architecture, torchvision's."""
    file: str | None = None
    """File (path or URI) of the state dict, as torchvision publishes it; null: torchvision's own download."""


AnyTrunk = RandomTrunkConfig | CheckpointTrunkConfig | SupervisedTrunkConfig
TrunkConfig = Annotated[AnyTrunk, Field(discriminator="kind")]


def make_trunk(settings: AnyTrunk) -> Trunk:
    """The trunk on the CPU; a random one from the global RNG.

    Raises:
        ConfigError: what was asked for is not there, is damaged, or is of another network.
    """
    match settings:
        case RandomTrunkConfig():
            return Trunk(settings.backbone)
        case CheckpointTrunkConfig():
            return load_checkpoint_trunk(settings.uri)
        case SupervisedTrunkConfig():
            trunk = Trunk(BackboneConfig(name=settings.name))
            state = _supervised_state(settings)
            try:
                trunk.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
            except (RuntimeError, AttributeError) as error:
                raise ConfigError(f"trunk.file: {_short(error)}; give {settings.name}'s state dict") from None
            return trunk


def load_checkpoint_trunk(uri: str) -> Trunk:
    """The ResNet trunk of the pretraining checkpoint at `uri`, on the CPU.

    Raises:
        ConfigError: there is none, it is damaged, or its trunk is no ResNet.
    """
    try:
        trunk = load_trunk(uri)
    except (CheckpointError, DataError, OSError) as error:
        raise ConfigError(f"trunk.uri: {uri} is not a checkpoint ({_short(error)})") from None
    except ConfigError as error:
        raise ConfigError(f"trunk.uri: {uri} is not of a pretraining run ({error})") from None
    except RuntimeError as error:
        raise ConfigError(f"trunk.uri: {uri} holds other networks than its configuration ({_short(error)})") from None
    if not isinstance(trunk, Trunk):
        raise ConfigError(f"trunk.uri: {uri} holds no ResNet, which the detectors need")
    return trunk


def _supervised_state(settings: SupervisedTrunkConfig) -> dict[str, Any]:
    if settings.file is None:
        try:
            return torchvision.models.get_model_weights(settings.name)["IMAGENET1K_V1"].get_state_dict(progress=False)
        except Exception as error:
            raise ConfigError(
                f"trunk.file: torchvision cannot download {settings.name}'s weights here ({_short(error)}); "
                "give the path of the file"
            ) from None
    try:
        filesystem, path = resolve_uri(settings.file)
        with filesystem.open_input_file(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds
        raise ConfigError(f"trunk.file: {settings.file} cannot be read ({_short(error)})") from None


def _short(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
