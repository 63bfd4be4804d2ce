"""A checkpoint is a folder: `state.pt` (tensors only), `config.yaml` and `meta.json`."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the folder and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint belongs to, readable without torch."""

    step: int  # updates done; the run's data cursor is this times the global batch size
    config_sha256: str
    manifest_sha256: str


def write_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, config_yaml: str, meta: CheckpointMeta
) -> None:
    """Write everything that is needed to continue into `folder`, `meta.json` last: without it there is no checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "step": meta.step,
    }
    torch.save(state, folder / STATE)
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    (folder / META).write_text(json.dumps(asdict(meta)), encoding="utf-8")


def read_meta(folder: Path) -> CheckpointMeta:
    """What the checkpoint in `folder` belongs to.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    try:
        return CheckpointMeta(**json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint ({META}: {error})") from None


def read_state(folder: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The tensors of the checkpoint in `folder`; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise CheckpointError(f"{folder}: {STATE} cannot be read ({str(error).splitlines()[0]})") from None
    return state


def new_folder() -> Path:
    """A fresh local folder to write a checkpoint or artifacts into; whoever it is reported to removes it."""
    return Path(tempfile.mkdtemp(prefix="report-"))
