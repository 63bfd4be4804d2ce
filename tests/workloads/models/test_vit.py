"""The transformer trunk: timm's own forward and attention as the oracle, and weights from files."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workloads.errors import ConfigError
from workloads.models.backbone import IMAGENET_MEAN, IMAGENET_STD, imagenet_normalized
from workloads.models.vit import VitConfig, VitTrunk, load_vit_weights

timm = pytest.importorskip("timm")


def make(**options: object) -> VitTrunk:
    torch.manual_seed(0)
    trunk = VitTrunk(VitConfig(depth=2, **options)).eval()
    for parameter in trunk.parameters():  # timm's zero biases would hide a bias that is left out
        torch.nn.init.normal_(parameter, std=0.2)
    return trunk


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 80), (16, 64)])
def test_tokens_and_attention_are_timms(size_hw: tuple[int, int]) -> None:
    trunk, images = make(), torch.randn(2, 3, *size_hw)
    grid = (size_hw[0] // 16, size_hw[1] // 16)
    attention = trunk.body.blocks[-1].attn
    seen = []
    attention.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        tokens = trunk(images)
        reference = trunk.body.forward_features(images)
        found = trunk.last_attention(images)
    torch.testing.assert_close(tokens.cls, reference[:, 0])
    patches = reference[:, 1:].reshape(2, *grid, trunk.channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(tokens.patches, patches)
    assert found.grid_hw == grid
    # The slow way: all of qkv as the block itself computed it, all queries, every head's softmax.
    qkv = seen[-1].reshape(2, -1, 3, attention.num_heads, trunk.channels // attention.num_heads)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    weights = (q * attention.scale @ k.transpose(-2, -1)).softmax(-1)
    torch.testing.assert_close(found.keys, k.transpose(1, 2).reshape(2, -1, trunk.channels)[:, 1:])
    torch.testing.assert_close(found.cls_attention, weights[:, :, 0, 1:])


def test_state_dict_loads_into_plain_timm() -> None:
    trunk = VitTrunk(VitConfig(name="vit_tiny"))
    timm.create_model("vit_tiny_patch16_224", num_classes=0).load_state_dict(trunk.body.state_dict(), strict=True)
    assert (trunk.channels, trunk.patch_size) == (192, 16)


def test_every_parameter_gets_a_gradient() -> None:
    trunk = make().train()
    tokens = trunk(torch.randn(2, 3, 32, 32))
    (tokens.cls.square().sum() + tokens.patches.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.parameters())


@pytest.mark.parametrize("form", ["plain", "teacher", "safetensors"])
def test_weights_from_a_file(tmp_path: Path, form: str) -> None:
    trunk = make(name="vit_small_dino")
    state = trunk.body.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    elif form == "teacher":
        wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
        torch.save({"teacher": {**wrapped, "module.head.last_layer.weight": torch.zeros(3)}, "epoch": 100}, path)
    else:
        torch.save({**state, "head.weight": torch.zeros(3)}, path)
    other = VitTrunk(VitConfig(name="vit_small_dino", depth=2, weights=str(path)))
    assert all(torch.equal(value, state[name]) for name, value in other.body.state_dict().items())


class _Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["HARM"],)


def test_files_that_are_not_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    (tmp_path / "harm.pth").write_bytes(pickle.dumps({"cls_token": _Harm()}))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    trunk = make()
    with pytest.raises(ConfigError, match="there is no file"):
        load_vit_weights(trunk, tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match="not a file of tensors alone"):
        load_vit_weights(trunk, tmp_path / "harm.pth")
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ConfigError, match="another model"):
        load_vit_weights(trunk, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="holds a list"):
        load_vit_weights(trunk, tmp_path / "list.pth")


def test_a_dino_file_with_its_command_line_in_it_is_read(tmp_path: Path) -> None:
    trunk = make()
    state = {f"module.backbone.{name}": value + 1 for name, value in trunk.body.state_dict().items()}
    content = {"teacher": state, "student": {}, "args": argparse.Namespace(arch="vit_small", out=Path("x").name)}
    torch.save(content, tmp_path / "full.pth")
    load_vit_weights(trunk, tmp_path / "full.pth")
    assert torch.equal(trunk.body.cls_token, state["module.backbone.cls_token"])


def test_download_that_fails_is_said_in_words() -> None:
    code = (
        "from workloads.models.vit import *\n"
        "try: VitTrunk(VitConfig(name='vit_tiny', weights='timm'))\n"
        "except ConfigError as error: assert 'give a local file instead' in str(error), error\n"
        "else: raise SystemExit('it was there')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ConfigError, match="patch_size=16"):
        VitTrunk(VitConfig(weights="timm", patch_size=8))


def test_normalisation_is_imagenets() -> None:
    images = torch.tensor(IMAGENET_MEAN)[None, :, None, None] + torch.tensor(IMAGENET_STD)[None, :, None, None]
    torch.testing.assert_close(imagenet_normalized(images), torch.ones(1, 3, 1, 1))
