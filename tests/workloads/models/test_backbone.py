"""Trunk, pyramid and norms against torchvision's own."""

import pytest
import torch
from torchvision.models import resnet18
from torchvision.ops import FeaturePyramidNetwork

from tests.processes import run_on_ranks
from workloads.config import build
from workloads.errors import ConfigError
from workloads.models.backbone import BackboneConfig, GlobalBatchNorm2d, Trunk
from workloads.models.fpn import STRIDES, Pyramid
from workloads.models.heads import Projector


def test_trunk_is_torchvisions_resnet_under_torchvisions_names():
    trunk = Trunk(BackboneConfig(name="resnet18")).eval()
    plain = resnet18()
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(trunk.body.state_dict(), strict=True)
    images = torch.rand(2, 3, 64, 96)
    stages = trunk(images)
    assert {name: tuple(s.shape[1:]) for name, s in stages.items()} == {
        "C2": (64, 16, 24),
        "C3": (128, 8, 12),
        "C4": (256, 4, 6),
        "C5": (512, 2, 3),
    }
    torch.testing.assert_close(stages["C5"].mean((-2, -1)), plain.eval()(images))


def test_pyramid_equals_torchvisions():
    channels = (64, 128, 256, 512)
    ours = Pyramid(channels, 32, ("P3", "P4", "P5"))
    theirs = FeaturePyramidNetwork(list(channels[1:]), 32)
    names = {}
    for i, level in enumerate(("P3", "P4", "P5")):
        names |= {f"inner_blocks.{i}.0.{k}": v for k, v in ours.lateral[level].state_dict().items()}
        names |= {f"layer_blocks.{i}.0.{k}": v for k, v in ours.output[level].state_dict().items()}
    theirs.load_state_dict(names, strict=True)
    stages = {f"C{i}": torch.rand(2, channels[i - 2], 128 // 2**i, 96 // 2**i) for i in (3, 4, 5)}
    for ours_level, theirs_level in zip(ours(stages).values(), theirs(stages).values(), strict=True):
        torch.testing.assert_close(ours_level, theirs_level)


@pytest.mark.parametrize("levels", [("P3",), ("P5", "P3"), ("P3", "P4", "P5", "P6", "P7"), ("P7",)])
def test_levels_come_in_order_at_their_strides(levels):
    stages = {f"C{i}": torch.rand(1, 8, 256 // 2**i, 256 // 2**i) for i in (3, 4, 5)}
    pyramid = Pyramid((8, 8, 8, 8), 4, levels)(stages)
    assert list(pyramid) == sorted(levels)
    assert all(p.shape[-1] == 256 // STRIDES[level] for level, p in pyramid.items())


SHARES = {1: [7], 3: [4, 2, 1]}


def normalize_on_rank(rank: int, world_size: int, mean: float, dtype: torch.dtype) -> dict:
    """Values of deviation 1 about `mean` through torch's norm on one process and ours on three."""
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 4, 5, dtype=torch.float64) + mean).float().to(dtype)  # the same float32 values in both
    weight = torch.randn(7, 3, 4, 5, dtype=torch.float64)
    norm = (torch.nn.BatchNorm2d(3) if world_size == 1 else GlobalBatchNorm2d(3)).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    first = sum(SHARES[world_size][:rank])
    rows = slice(first, first + SHARES[world_size][rank])
    part = x[rows].clone().requires_grad_()
    out = norm(part)
    (out * weight[rows]).sum().backward()
    return {
        "out": out.detach().double(),
        "gradient": part.grad.double(),
        "weight": norm.weight.grad.double(),
        "bias": norm.bias.grad.double(),
        "mean": norm.running_mean.double(),
        "var": norm.running_var.double(),
    }


CASES = [(33.0, torch.float64, 1e-9), (1000.0, torch.float32, 4e-4), (3000.0, torch.float32, 1e-3)]
"""Mean over deviation, the precision that ours computes in, and how far it may be from BatchNorm in float64."""


def all_cases(rank: int, world_size: int) -> list[dict]:
    return [normalize_on_rank(rank, world_size, mean, dtype) for mean, dtype, _ in CASES]


def test_global_batch_norm_on_three_uneven_ranks_is_batch_norm_on_one(tmp_path):
    ranks = run_on_ranks(all_cases, 3, tmp_path)
    for case, (mean, _, tolerance) in enumerate(CASES):
        alone = normalize_on_rank(0, 1, mean, torch.float64)
        found = [rank[case] for rank in ranks]
        for name in ("out", "gradient"):
            torch.testing.assert_close(torch.cat([r[name] for r in found]), alone[name], rtol=0, atol=tolerance)
        for name in ("weight", "bias"):  # DDP would average these
            total = torch.stack([r[name] for r in found]).sum(0)
            torch.testing.assert_close(total, alone[name], rtol=0, atol=20 * tolerance)
        for name in ("mean", "var"):
            torch.testing.assert_close(found[2][name], alone[name], rtol=tolerance, atol=tolerance)


def test_group_norm_has_no_statistics_and_projector_takes_one_crop():
    names = [name for name, _ in Trunk(BackboneConfig(norm="group")).named_buffers()]
    assert names == []
    assert Projector(8, 16, 4)(torch.rand(1, 8)).shape == (1, 4)


def test_unknown_backbone_is_refused_in_words():
    with pytest.raises(ConfigError, match="name"):
        build(BackboneConfig, {"name": "resnet19"})
