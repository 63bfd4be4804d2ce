"""Loads a trunk (`load`): from a pretraining checkpoint, torchvision's supervised weights or a ViT's file, or with random weights."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torchvision
from pydantic import Field
from torch import Tensor

from workloads.config import ADDED_LATER, build, config, parse_yaml
from workloads.errors import ConfigError, DataError
from workloads.models.backbone import BackboneConfig, Trunk, make_trunk
from workloads.models.vit import VitConfig, VitTrunk
from workloads.storage.checkpoint import CONFIG, CheckpointError, read_checkpoint
from workloads.storage.filesystems import read_bytes, resolve_uri


@config
class RandomTrunkConfig:
    """Random weights from the run's seed: the untrained baseline."""

    kind: Literal["random"] = "random"
    """Source of the trunk."""
    backbone: BackboneConfig = BackboneConfig()


@config
class CheckpointTrunkConfig:
    """The trunk of a pretraining run; of two, the one for full views."""

    kind: Literal["checkpoint"] = "checkpoint"
    """Source of the trunk."""
    uri: str
    """Folder or s3:// address of a checkpoint (RUN/checkpoints/step_…)."""
    pyramid: Annotated[bool, ADDED_LATER] = False
    """Whether a detector's feature pyramid starts from the checkpoint's too (objective anchor_ntxent); detector.fpn_channels must
    then be its objective.projection_dim."""


@config
class SupervisedTrunkConfig:
    """torchvision's supervised ImageNet weights."""

    kind: Literal["supervised"] = "supervised"
    """Source of the trunk."""
    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """Architecture, by torchvision's name."""
    file: str | None = None
    """File (path or URI) of the state dict, as torchvision publishes it; null: torchvision's own download."""


@config
class VitTrunkConfig:
    """A vision transformer with random weights, timm's, or those of a local file such as DINO's."""

    kind: Literal["vit"] = "vit"
    """Source of the trunk."""
    vit: VitConfig = VitConfig()


AnyResNetTrunk = RandomTrunkConfig | CheckpointTrunkConfig | SupervisedTrunkConfig
AnyTrunk = AnyResNetTrunk | VitTrunkConfig
ResNetTrunkConfig = Annotated[AnyResNetTrunk, Field(discriminator="kind")]
TrunkConfig = Annotated[AnyTrunk, Field(discriminator="kind")]

_TRUNK_PREFIXES = ("trunk.", "online.trunk.")
"""Of the trunk's names in the state of an objective; the second is that of DetCo's query network."""

_PYRAMID_PREFIX = "pyramid."


def load(settings: AnyTrunk) -> Trunk | VitTrunk:
    """The trunk on the CPU; random weights are drawn from the global RNG.

    Raises:
        ConfigError: the checkpoint or file is missing, damaged, or of another network.
    """
    match settings:
        case RandomTrunkConfig():
            return make_trunk(settings.backbone)
        case CheckpointTrunkConfig():
            return _checkpoint_trunk(settings.uri)
        case SupervisedTrunkConfig():
            trunk = Trunk(BackboneConfig(name=settings.name))
            state = _supervised_state(settings)
            try:
                trunk.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
            except (RuntimeError, AttributeError) as error:
                raise ConfigError(f"trunk.file: {_short(error)}; give {settings.name}'s state dict") from None
            return trunk
        case VitTrunkConfig():
            return VitTrunk(settings.vit)


def load_resnet(settings: AnyResNetTrunk) -> Trunk:
    """As `load`, for a detector, which needs feature maps of four scales.

    Raises:
        ConfigError: as `load`, or the trunk is a transformer.
    """
    trunk = load(settings)
    if not isinstance(trunk, Trunk):
        key = "backbone.name" if isinstance(settings, RandomTrunkConfig) else "uri"
        raise ConfigError(
            f"trunk.{key}: a transformer, but a detector needs a ResNet; name a ResNet's checkpoint or backbone"
        )
    return trunk


def _checkpoint_trunk(uri: str) -> Trunk | VitTrunk:
    try:
        return load_trunk(uri)
    except (CheckpointError, DataError, OSError) as error:
        raise ConfigError(f"trunk.uri: {uri} is not a checkpoint ({_short(error)})") from None
    except ConfigError as error:
        raise ConfigError(f"trunk.uri: {uri} is not the checkpoint of a pretraining run ({error})") from None
    except RuntimeError as error:
        raise ConfigError(f"trunk.uri: {uri} holds another network than its configuration ({_short(error)})") from None


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


def load_trunk(uri: str | Path, *, device: torch.device | str = "cpu") -> "Trunk | VitTrunk":
    """The trunk of a checkpoint of any objective, in eval mode.

    Args:
        uri: folder or s3:// address of a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or a damaged one.
        ConfigError: it holds no trunk of a pretraining run.
        DataError, OSError: the storage cannot be reached.
    """
    filesystem, folder = resolve_uri(str(uri))
    state = read_checkpoint(folder, filesystem, device=device).state["model"]
    text = read_bytes(filesystem, f"{folder}/{CONFIG}").decode()
    backbone = build(BackboneConfig, parse_yaml(text, source=f"{uri}/{CONFIG}").get("backbone", {}))
    trunk = make_trunk(backbone).to(device)
    prefix = next((p for p in _TRUNK_PREFIXES if any(name.startswith(p) for name in state)), None)
    if prefix is None:
        raise ConfigError(f"{uri}: no parameter is named {' or '.join(p + '…' for p in _TRUNK_PREFIXES)}")
    trunk.load_state_dict({n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)})
    return trunk.eval()


def load_pyramid(uri: str) -> dict[str, Tensor]:
    """The parameters of the feature pyramid of a checkpoint, by their names in `models.fpn.Pyramid`, on the CPU.

    Raises:
        ConfigError: there is no checkpoint, or its objective trained no pyramid.
    """
    try:
        filesystem, folder = resolve_uri(uri)
        state = read_checkpoint(folder, filesystem, device="cpu").state["model"]
    except (CheckpointError, DataError, OSError) as error:
        raise ConfigError(f"trunk.uri: {uri} is not a checkpoint ({_short(error)})") from None
    named = {n.removeprefix(_PYRAMID_PREFIX): value for n, value in state.items() if n.startswith(_PYRAMID_PREFIX)}
    if not named:
        raise ConfigError(
            f"trunk.pyramid: {uri} holds no feature pyramid; only objective anchor_ntxent trains one, so leave trunk.pyramid out"
        )
    return named
