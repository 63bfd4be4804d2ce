"""Gradient caching against the step that holds everything at once: the same loss, gradients and statistics."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.processes import run_on_ranks
from tests.workloads.objectives.test_anchor_ntxent import part_of, views_of
from workloads.config import build
from workloads.errors import ConfigError
from workloads.models.backbone import BackboneConfig
from workloads.objectives.anchor_ntxent import AnchorNTXent, AnchorNTXentConfig
from workloads.parallel.gradient_cache import backward_in_micro_batches
from workloads.spec.pretrain import PretrainConfig
from workloads.types import Views


def model_of(norm: str = "group", **options: object) -> AnchorNTXent:
    """In float64: convolutions of one image round otherwise than those of seven, which group norms over few pixels amplify."""
    torch.manual_seed(0)
    settings = AnchorNTXentConfig(anchor_negatives=9, projection_dim=16, projector_hidden=16, **options)
    return AnchorNTXent(settings, BackboneConfig(norm=norm), crop_size=32, seed=3).train().double()


def precise(images: int, crops: int) -> Views:
    views = views_of(images, crops)
    return dataclasses.replace(views, full=views.full.double(), crops=views.crops.double())


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("options", [{}, {"symmetric": True, "shared_trunk": True, "crop_grid": 6}])
def test_same_loss_and_gradients_as_the_whole_step(micro_batch_size, options):
    views = precise(7, 2)
    whole, cached = model_of(**options), model_of(**options)
    expected = whole(views)
    expected.loss.backward()
    found = backward_in_micro_batches(cached, views, micro_batch_size)
    assert float(found.loss) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    assert found.metrics.keys() == expected.metrics.keys()
    assert_close(gradients_of(cached), gradients_of(whole))


def on_rank(rank: int, world_size: int) -> dict:
    shares = {1: [7], 2: [4, 3]}[world_size]
    first = sum(shares[:rank])
    model = model_of()
    result = backward_in_micro_batches(model, part_of(precise(7, 2), slice(first, first + shares[rank])), 2)
    return {"loss": result.metrics["train/loss"], "gradients": gradients_of(model)}


def test_same_on_two_processes_that_hold_different_numbers_of_micro_batches(tmp_path):
    whole = model_of()
    expected = whole(precise(7, 2))
    expected.loss.backward()
    for rank in run_on_ranks(on_rank, 2, tmp_path):
        assert float(rank["loss"]) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
        assert_close(rank["gradients"], gradients_of(whole))


def test_running_statistics_are_those_of_one_pass():
    views = precise(6, 2)
    once, cached = model_of("batch"), model_of("batch")
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 6)):
            once.embed(views.rows(part))
    backward_in_micro_batches(cached, views, 3)
    for (name, a), (_, b) in zip(once.named_buffers(), cached.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(m.track_running_stats for m in cached.modules() if isinstance(m, nn.BatchNorm2d))


class Noisy(nn.Module):
    """An objective whose networks draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.drawn: list[torch.Tensor] = []

    def embed(self, views):
        drawn = torch.rand(views.valid.shape[0], 4)
        self.drawn.append(drawn)
        return {"x": self.layer(views.full.mean((2, 3))) * drawn}

    def loss(self, embeddings, views):
        from workloads.types import StepResult

        return StepResult(loss=embeddings["x"].square().sum(), metrics={})


def test_the_second_pass_draws_what_the_first_drew_and_later_draws_go_on():
    torch.manual_seed(1)
    model = Noisy()
    torch.manual_seed(2)
    backward_in_micro_batches(model, views_of(5, 1), 2)
    after = torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(model.drawn[:3], model.drawn[3:], strict=True))
    torch.manual_seed(2)
    for size in (2, 2, 1):
        torch.rand(size, 4)
    assert torch.equal(after, torch.rand(1))


def test_norms_that_would_make_it_another_model_are_refused():
    micro = {"data": {"uri": "x"}, "micro_batch_size": 2}
    with pytest.raises(ConfigError, match=r"micro_batch_size.*backbone\.norm=group"):
        build(PretrainConfig, micro)
    with pytest.raises(ConfigError, match="all of the batch at once"):
        build(PretrainConfig, micro | {"backbone": {"norm": "sync_batch"}})
    build(PretrainConfig, micro | {"backbone": {"norm": "group"}})
    build(PretrainConfig, micro | {"allow_local_statistics": True})
