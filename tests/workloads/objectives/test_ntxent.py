"""NT-Xent over two views against lightly's."""

import pytest
import torch
from lightly.loss import NTXentLoss

from workloads.objectives.ntxent import ntxent_loss


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("images", [2, 7])
def test_loss_and_gradient_equal_lightly(images, temperature):
    views = torch.randn(images, 2, 6, requires_grad=True)
    loss, _ = ntxent_loss(views, torch.arange(images), torch.ones(images, dtype=torch.bool), temperature=temperature)
    theirs = NTXentLoss(temperature=temperature)(views[:, 0], views[:, 1])
    torch.testing.assert_close(loss.mean(), theirs, rtol=1e-5, atol=1e-6)
    ours, expected = (torch.autograd.grad(x, views, retain_graph=True)[0] for x in (loss.mean(), theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_an_invalid_image_touches_nothing_not_even_as_nan():
    views = torch.randn(4, 2, 6)
    valid = torch.tensor([True, True, True, False])
    expected, _ = ntxent_loss(views[:3], torch.arange(3), valid[:3], temperature=0.1)
    views[3] = torch.nan
    views.requires_grad_()
    loss, found = ntxent_loss(views, torch.arange(4), valid, temperature=0.1)
    torch.testing.assert_close(loss[:3], expected)
    assert loss[3].tolist() == [0.0, 0.0] and not found[3].any()
    loss.sum().backward()
    assert torch.isfinite(views.grad).all()


def test_one_image_alone_has_no_negative():
    loss, found = ntxent_loss(torch.randn(1, 2, 4), torch.tensor([5]), torch.tensor([True]), temperature=0.1)
    assert loss.tolist() == [[0.0, 0.0]] and found.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    views = torch.randn(5, 2, 8).to(dtype)
    arguments = (torch.arange(5), torch.ones(5, dtype=torch.bool))
    loss, _ = ntxent_loss(views, *arguments, temperature=0.02)
    exact, _ = ntxent_loss(views.float(), *arguments, temperature=0.02)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
