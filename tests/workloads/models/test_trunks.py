"""Trunks of checkpoints: by any objective's parameter names, and refused where there is none."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.workloads.test_copies import settings_of
from workloads.config import to_yaml
from workloads.errors import ConfigError
from workloads.models.trunks import CheckpointTrunkConfig, load, load_trunk
from workloads.spec.factory import build_objective
from workloads.storage.checkpoint import CheckpointMeta, take_snapshot, write_checkpoint


def checkpoint_of(model: nn.Module, config_yaml: str, folder: Path) -> str:
    meta = CheckpointMeta(step=1, config_sha256="", manifest_sha256="")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    write_checkpoint(
        take_snapshot(model=model, optimizer=optimizer, window={}, config_yaml=config_yaml, meta=meta), str(folder)
    )
    return str(folder)


@pytest.mark.parametrize("name", ["anchor_ntxent", "detco"])
def test_the_trained_trunk_of_an_objective_is_loaded(tmp_path: Path, name: str):
    settings = settings_of(name)
    objective = build_objective(settings)
    with torch.no_grad():
        next(objective.trunk.parameters()).add_(1.0)  # no other trunk of the objective has these weights
    trunk = load_trunk(checkpoint_of(objective, to_yaml(settings), tmp_path))
    for key, value in objective.trunk.state_dict().items():
        assert torch.equal(trunk.state_dict()[key], value), key


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    uri = checkpoint_of(nn.Linear(2, 2), "backbone: {name: resnet18}\n", tmp_path)
    with pytest.raises(
        ConfigError, match=r"trunk\.uri: .* is not the checkpoint of a pretraining run .*no parameter is named trunk"
    ):
        load(CheckpointTrunkConfig(uri=uri))
