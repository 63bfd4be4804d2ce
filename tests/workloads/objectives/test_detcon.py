"""DetCon against lightly's losses and a restatement with loops, its regions against hand-made ones."""

import copy

import pytest
import torch
from lightly.loss import DetConBLoss, DetConSLoss

from tests.oracles import detcon as oracle
from tests.workloads.objectives.pairs import pair_views_of
from workloads.data.views.cells import pool_regions
from workloads.models.backbone import BackboneConfig
from workloads.models.momentum import cosine_momentum
from workloads.objectives.detcon import DetCon, DetConConfig, detcon_loss, draw_regions, pool_by_region
from workloads.parallel.gradient_cache import backward_in_micro_batches


def case(images=4, drawn=6, dim=7, regions=4, seed=0, dtype=torch.float32):
    """Duplicated numbers, and now and then a region that the other view does not show."""
    g = torch.Generator().manual_seed(seed)
    online, target = torch.randn(2, images, 2, drawn, dim, generator=g, dtype=dtype)
    return online, target, torch.randint(1, regions + 1, (images, 2, drawn), generator=g)


def ours(online, target, regions, valid=None, temperature=0.1):
    n = len(regions)
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    loss, _ = detcon_loss(online, target, regions, torch.arange(n), valid, temperature=temperature)
    return loss.sum() / (valid.sum() * regions.shape[-1])


@pytest.mark.parametrize(("images", "regions"), [(4, 4), (1, 3), (3, 1), (5, 40)])
def test_b_equals_lightly(images, regions):
    online, target, ids = case(images, regions=regions)
    online.requires_grad_()
    loss = ours(online, target, ids)
    theirs = DetConBLoss(gather_distributed=False)(
        online[:, 0], online[:, 1], target[:, 0], target[:, 1], ids[:, 0], ids[:, 1]
    )
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    if loss > 0:
        expected = torch.autograd.grad(theirs, online)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, online)[0], expected, rtol=1e-4, atol=1e-6)


def test_s_equals_lightly_with_gradient_on_both_sides():
    online, _, ids = case(seed=3)
    online.requires_grad_()
    loss = ours(online, online, ids)
    theirs = DetConSLoss(gather_distributed=False)(online[:, 0], online[:, 1], ids[:, 0], ids[:, 1])
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, online)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, online)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_equals_the_loops(temperature):
    online, target, ids = case(images=5, regions=6, seed=1, dtype=torch.float64)
    ids[1, 0] = 0  # this view kept no region
    ids[2] = 0  # nor did either of these
    valid = torch.tensor([True, True, True, True, False])
    loss = ours(online, target, ids, valid, temperature)
    expected = oracle.loss(online.tolist(), target.tolist(), ids.tolist(), valid.tolist(), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_what_is_absent_from_both_views_is_no_positive():
    """Two views that show no region agree in that, which must not attract them."""
    online, target, ids = case(images=2)
    ids[0] = 0
    loss, counted = detcon_loss(online, target, ids, torch.arange(2), torch.ones(2, dtype=torch.bool), temperature=0.1)
    assert not counted[0].any() and float(loss[0].abs().max()) == 0.0
    others = target.clone()
    others[0] = torch.nan  # nor is it anybody's negative
    again, _ = detcon_loss(online, others, ids, torch.arange(2), torch.ones(2, dtype=torch.bool), temperature=0.1)
    torch.testing.assert_close(again[1], loss[1])


def test_an_image_whose_views_share_no_region_counts_in_the_mean_and_attracts_nothing():
    online, target, ids = case(images=2)
    ids[0, 0], ids[0, 1] = 1, 2
    loss, counted = detcon_loss(online, target, ids, torch.arange(2), torch.ones(2, dtype=torch.bool), temperature=0.1)
    assert not counted[0].any() and not loss[0].any() and counted[1].any()


def test_only_invalid_images_give_zero_and_finite_gradients():
    online, target, ids = case(images=2)
    online[:] = torch.nan
    online.requires_grad_()
    loss, _ = detcon_loss(online, target, ids, torch.arange(2), torch.zeros(2, dtype=torch.bool), temperature=0.1)
    assert float(loss.sum().detach()) == 0.0
    loss.sum().backward()
    assert not online.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    online, target, ids = case(seed=5)
    online, target = online.to(dtype), target.to(dtype)
    torch.testing.assert_close(
        ours(online, target, ids, temperature=0.02), ours(online.float(), target.float(), ids, temperature=0.02)
    )


@pytest.mark.parametrize("most", [2, 5, 300])
def test_cells_have_the_region_of_most_pixels_and_of_several_the_lowest(most):
    pixels = torch.randint(0, most + 1, (3, 12, 12), generator=torch.Generator().manual_seed(most))
    found = pool_regions(pixels, 3, most)
    assert found.tolist() == [oracle.cell_regions(image.tolist(), 3) for image in pixels]


def test_a_tie_goes_to_the_lowest_number():
    assert pool_regions(torch.tensor([[[7, 300], [300, 7]]]), 1, 300).item() == 7


def test_regions_are_drawn_evenly_from_those_that_are_there():
    cells = torch.tensor([[[0, 3], [9, 3]], [[0, 0], [0, 0]], [[4, 4], [4, 4]]])
    draws = torch.linspace(0, 0.999, 10).expand(3, -1)
    drawn = draw_regions(cells, 300, draws)
    assert drawn[0].tolist() == [3] * 5 + [9] * 5
    assert drawn[1].tolist() == [0] * 10 and drawn[2].tolist() == [4] * 10
    assert draw_regions(cells, 300, torch.full((3, 1), 1 - 2**-24)).flatten().tolist() == [9, 0, 4]


def test_a_region_is_the_mean_of_its_cells():
    features = torch.arange(8.0).reshape(1, 2, 2, 2)
    cells = torch.tensor([[[1, 2], [2, 2]]])
    pooled = pool_by_region(features, cells, torch.tensor([[1, 2, 2, 9]]))
    assert pooled[0].tolist() == [[0, 4], [2, 6], [2, 6], [0, 0]]


def model_of(variant: str = "B", norm: str = "group") -> DetCon:
    torch.manual_seed(0)
    settings = DetConConfig(variant=variant, projector_hidden=16, projection_dim=8, regions_per_view=4)
    return DetCon(settings, BackboneConfig(norm=norm), seed=3)


def test_both_networks_see_the_same_regions_and_only_b_has_a_predictor():
    model, views = model_of(), pair_views_of(3)
    model.predictor = torch.nn.Identity()
    embedded = model.embed(views)
    torch.testing.assert_close(embedded["online"], embedded["target"])  # a copy of the same weights
    assert not embedded["target"].requires_grad
    plain = model_of("S")
    assert plain.predictor is None and plain.target is None and set(plain.embed(views)) == {"online"}


def test_the_target_follows_along_a_cosine_and_no_gradient_reaches_it():
    model = model_of()
    before = copy.deepcopy(model.target)
    with torch.no_grad():
        for parameter in (*model.trunk.parameters(), *model.projector.parameters()):
            parameter += 1.0
    model.after_update(0, 100)
    for old, new, online in zip(
        before["projector"].parameters(),
        model.target["projector"].parameters(),
        model.projector.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(new, 0.996 * old + 0.004 * online)
        assert not new.requires_grad
    assert cosine_momentum(0.996, 0, 100) == pytest.approx(0.996)
    assert cosine_momentum(0.996, 50, 100) == pytest.approx(0.998)
    assert cosine_momentum(0.996, 100, 100) == 1.0


@pytest.mark.parametrize("variant", ["S", "B"])
def test_micro_batches_give_the_same_loss_and_gradients(variant):
    views = pair_views_of(5, last_is_valid=False)
    whole, cached = model_of(variant), model_of(variant)
    expected = whole(views)
    expected.loss.backward()
    found = backward_in_micro_batches(cached, views, 2)
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(whole.named_parameters(), cached.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=2e-5 * float(a.grad.abs().max()), msg=name)
