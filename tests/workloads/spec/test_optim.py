"""The schedule by hand, and LARS against its formula."""

import pytest
import torch

from workloads.spec.optim import AdamWConfig, LARSConfig, ScheduleConfig, SGDConfig, make_optimizer, rate_at


def test_rate_rises_linearly_peaks_and_ends_at_the_floor():
    schedule = ScheduleConfig(warmup=0.1, floor=0.02)
    rates = [rate_at(step, 100, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.51) and rates[99] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rate_at(0, 1, ScheduleConfig(warmup=0.0)) == pytest.approx(0.02)


def test_biases_and_norms_are_not_decayed():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for settings in (AdamWConfig(), SGDConfig(), LARSConfig()):
        decayed, free = make_optimizer(module, settings).param_groups
        assert [p.ndim for p in decayed["params"]] == [4] and decayed["weight_decay"] == settings.weight_decay
        assert [p.ndim for p in free["params"]] == [1, 1, 1] and free["weight_decay"] == 0


def test_lars_follows_its_formula_for_two_steps():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    settings = LARSConfig(lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.01)
    optimizer = make_optimizer(layer, settings)
    expected = {n: p.detach().clone().double() for n, p in layer.named_parameters()}
    speed = {n: torch.zeros_like(p) for n, p in expected.items()}
    for _ in range(2):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient, weight = parameter.grad.double(), expected[name]
            if weight.ndim > 1:
                gradient = gradient + 0.1 * weight
                gradient = gradient * 0.01 * weight.norm() / gradient.norm()
            speed[name] = 0.9 * speed[name] + gradient
            expected[name] = weight - 0.5 * speed[name]
        optimizer.step()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_lars_leaves_a_zero_layer_finite():
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(layer.weight)
    optimizer = make_optimizer(layer, LARSConfig())
    layer.weight.grad, layer.bias.grad = torch.ones(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.isfinite(layer.weight).all() and layer.weight.abs().max() > 0


def test_without_decay_lars_is_timms():
    """With decay they differ: timm divides by ‖g‖ + λ‖w‖, as the first paper; BYOL's and DetCon's code by ‖g + λw‖."""
    timm_optim = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, LARSConfig(lr=0.5, weight_decay=0.0, trust=0.01))
    groups = [{"params": [theirs.weight], "always_adapt": True}, {"params": [theirs.bias]}]
    other = timm_optim.Lars(groups, lr=0.5, momentum=0.9, trust_coeff=0.01)
    for _ in range(3):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)
