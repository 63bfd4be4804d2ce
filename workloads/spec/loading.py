"""Loads the networks of a checkpoint: a complete model, initial weights, or the trunk alone."""

from pathlib import Path

import torch

from workloads.config import build, read_yaml
from workloads.errors import ConfigError, DataError
from workloads.models.trunks import load_trunk
from workloads.spec.factory import AnyObjective, build_objective
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CONFIG, CheckpointError, read_checkpoint
from workloads.storage.filesystems import resolve_uri


def load_initial_weights(objective: torch.nn.Module, uri: str, *, device: torch.device) -> None:
    """Start `objective` from the networks of the checkpoint at `uri`.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it is of other networks.
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


def load_model(checkpoint: Path, *, device: torch.device | str = "cpu") -> tuple[AnyObjective, PretrainConfig]:
    """The networks of a checkpoint, in eval mode, and the run's config.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    settings = build(PretrainConfig, read_yaml(checkpoint / CONFIG))
    model = build_objective(settings).to(device)
    model.load_state_dict(read_checkpoint(str(checkpoint), device=device).state["model"])
    return model.eval(), settings


def load_initial_trunk(objective: AnyObjective, uri: str, *, device: torch.device) -> None:
    """Start `objective`'s trunk from that of the checkpoint at `uri`.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it is of another trunk.
    """
    try:
        objective.trunk.load_state_dict(load_trunk(uri, device=device).state_dict())
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        raise ConfigError(f"trunk_from: {error}") from None
    except RuntimeError:
        raise ConfigError(
            f"trunk_from: {uri} holds another trunk than backbone says; give it the same name and norm"
        ) from None
