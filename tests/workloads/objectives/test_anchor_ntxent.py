"""Anchor NT-Xent against a double loop in float64, hand-computed cells, and itself on 1, 2 and 3 processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.oracles import anchor_ntxent as oracle
from tests.processes import run_on_ranks
from workloads.config import build
from workloads.data.views.cells import cell_of, cells_inside, centers_inside
from workloads.errors import ConfigError
from workloads.models.backbone import BackboneConfig
from workloads.objectives.anchor_ntxent import (
    AnchorNTXent,
    AnchorNTXentConfig,
    anchor_ntxent_loss,
    choose_anchors,
    embeddings_on_grid,
)
from workloads.types import CropGeometry, Views


def geometry_of(boxes, size: int = 128) -> CropGeometry:
    box = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 1, 4)
    flips = torch.zeros(len(box), 1, 2, dtype=torch.bool)
    return CropGeometry(
        box_xyxy=box, crop_flips=flips, full_flips=flips[:, 0], full_size_hw=(size, size), crop_size_hw=(32, 32)
    )


def random_case(n=7, cells=12, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    image = torch.tensor([0, 0, 1, 2, 2, 3, 4])[:n]
    levels = draw(5, cells, dim)[image]
    positive = torch.randint(cells, (n,), generator=g)
    anchors = torch.rand(n, cells, generator=g) < 0.4
    anchors[torch.arange(n), positive] = False
    return draw(n, dim), levels, positive, anchors, image, torch.tensor([True] * (n - 1) + [False])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_loss_and_gradient_equal_the_double_loop(temperature, symmetric):
    crops, levels, positive, anchors, image, valid = random_case()
    leaves = [crops.clone().requires_grad_(), levels.clone().requires_grad_()]

    def ours(crops, levels):
        cells = levels[torch.arange(len(crops)), positive]
        similarity = torch.einsum("nd,nad->na", F.normalize(crops, dim=-1), F.normalize(levels, dim=-1))
        loss, _ = anchor_ntxent_loss(
            crops, cells, similarity, anchors, image, valid, temperature=temperature, symmetric=symmetric
        )
        return loss.sum() / valid.sum()

    def restated(crops, levels):
        cells = [levels[i, int(positive[i])].tolist() for i in range(len(crops))]
        chosen = [row.nonzero().flatten().tolist() for row in anchors]
        return oracle.loss(
            crops.tolist(), cells, levels.tolist(), chosen, image.tolist(), valid.tolist(), temperature, symmetric
        )

    value = ours(*leaves)
    assert float(value.detach()) == pytest.approx(restated(crops, levels), rel=1e-5)
    gradients = torch.autograd.grad(value, leaves)
    for which in (0, 1):
        index = tuple(torch.randint(s, (1,)).item() for s in leaves[which].shape)
        for shape_index in (index, (0,) * leaves[which].ndim):
            ends = []
            for sign in (1, -1):
                moved = [crops.clone(), levels.clone()]
                moved[which][shape_index] += sign * 1e-5
                ends.append(restated(*moved))
            numeric = (ends[0] - ends[1]) / 2e-5
            assert float(gradients[which][shape_index]) == pytest.approx(numeric, abs=2e-5)


def test_without_anchors_it_is_cross_entropy_against_the_diagonal():
    crops, cells = torch.randn(6, 8), torch.randn(6, 8)
    none = torch.zeros(6, 0)
    loss, found = anchor_ntxent_loss(
        crops, cells, none, none.bool(), torch.arange(6), torch.ones(6, dtype=torch.bool), temperature=0.2
    )
    logits = F.normalize(crops, dim=-1) @ F.normalize(cells, dim=-1).T / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(6), reduction="none"))
    assert torch.equal(found, logits.argmax(1) == torch.arange(6))


def test_one_image_alone_has_only_its_anchors():
    crops, cells, anchors = torch.randn(1, 4), torch.randn(1, 4), torch.tensor([[0.3, -0.2]])
    arguments = (torch.tensor([0]), torch.tensor([True]))
    loss, _ = anchor_ntxent_loss(crops, cells, anchors, torch.tensor([[True, False]]), *arguments, temperature=1.0)
    positive = float(F.cosine_similarity(crops, cells))
    assert float(loss) == pytest.approx(-math.log(math.exp(positive) / (math.exp(positive) + math.exp(0.3))), rel=1e-5)
    nothing, _ = anchor_ntxent_loss(
        crops, cells, anchors, torch.zeros(1, 2, dtype=torch.bool), *arguments, temperature=1.0
    )
    assert float(nothing) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    crops, levels, positive, anchors, image, valid = random_case(seed=3)
    cells = levels[torch.arange(len(crops)), positive]
    similarity = torch.einsum("nd,nad->na", F.normalize(crops, dim=-1), F.normalize(levels, dim=-1))
    rounded = [t.to(dtype) for t in (crops, cells, similarity)]
    loss, _ = anchor_ntxent_loss(*rounded, anchors, image, valid, temperature=0.05)
    exact, _ = anchor_ntxent_loss(*[t.double() for t in rounded], anchors, image, valid, temperature=0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=1e-4, atol=1e-4)


def test_invalid_rows_touch_nothing_not_even_as_nan():
    crops, levels, positive, anchors, image, valid = random_case()
    cells = levels[torch.arange(len(crops)), positive].float()
    similarity = torch.zeros(len(crops), 12)
    broken = crops.float().clone()
    broken[-1] = float("nan")
    broken.requires_grad_()
    loss, _ = anchor_ntxent_loss(broken, cells, similarity, anchors, image, valid, temperature=0.1)
    loss[valid].sum().backward()
    assert torch.isfinite(loss[valid]).all() and torch.isfinite(broken.grad[:-1]).all()


BOXES = [
    (40, 8, 72, 40),  # well inside
    (0, 0, 13, 13),  # in a corner
    (115, 100, 128, 128),  # at the far border
    (60, 60, 63, 63),  # smaller than a cell, holding no centre
]


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("box", BOXES)
def test_available_anchors_equal_the_restatement_on_every_level(box, stride):
    grid = 128 // stride
    chosen = choose_anchors(geometry_of([box]), (grid, grid), 10_000, torch.rand(1, 1, grid * grid))
    assert chosen[0, 0].nonzero().flatten().tolist() == oracle.available_anchors(box, grid, 128)


def test_hand_computed_cells_of_a_coloured_square():
    """A red square at x 32…64, y 0…32 of a black 128 px image: on P4 (16 px) the cells (0,2), (0,3), (1,2), (1,3)."""
    image = torch.zeros(128, 128)
    image[0:32, 32:64] = 1.0
    red_cells = F.avg_pool2d(image[None, None], 16)[0, 0].flatten() == 1
    box = torch.tensor([32.0, 0.0, 64.0, 32.0])
    assert red_cells.nonzero().flatten().tolist() == [2, 3, 10, 11]
    assert torch.equal(centers_inside(box, (8, 8), (128, 128)), red_cells)
    assert torch.equal(cells_inside(box, (8, 8), (128, 128)), red_cells)
    assert int(cell_of(torch.tensor([48.0, 16.0]), (8, 8), (128, 128))) == 11
    anchors = choose_anchors(geometry_of([(32, 0, 64, 32)]), (8, 8), 64, torch.rand(1, 1, 64))
    assert torch.equal(anchors[0, 0], ~red_cells)
    assert int(cell_of(torch.tensor([128.0, 128.0]), (8, 8), (128, 128))) == 63  # the last cell is closed


def test_as_many_distinct_anchors_as_asked_or_as_there_are():
    geometry = geometry_of(BOXES)
    for count in (1, 5, 14, 15, 16, 100):
        chosen = choose_anchors(geometry, (4, 4), count, torch.rand(4, 1, 16))
        available = choose_anchors(geometry, (4, 4), 10_000, torch.rand(4, 1, 16))
        assert torch.equal(chosen.sum(-1), available.sum(-1).clamp(max=count))
        assert not (chosen & ~available).any()


def test_embeddings_on_another_grid_are_bilinear_at_its_centres():
    level = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(embeddings_on_grid(level, (4, 4)), level.flatten(2))
    # The 2 × 2 partition's centres lie on the corners between four cells.
    torch.testing.assert_close(embeddings_on_grid(level, (2, 2))[0, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))


def views_of(images: int, crops: int, seed: int = 0) -> Views:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, crops, 2, generator=g) * 32
    box = torch.cat([corner, corner + 8 + torch.rand(images, crops, 2, generator=g) * 24], dim=-1)
    flips = torch.zeros(images, crops, 2, dtype=torch.bool)
    valid = torch.ones(images, dtype=torch.bool)
    valid[1] = False
    return Views(
        full=torch.rand(images, 3, 64, 64, generator=g),
        crops=torch.rand(images, crops, 3, 32, 32, generator=g),
        geometry=CropGeometry(
            box_xyxy=box, crop_flips=flips, full_flips=flips[:, 0], full_size_hw=(64, 64), crop_size_hw=(32, 32)
        ),
        valid=valid,
        positions=torch.arange(100, 100 + images),
        epoch=1,
    )


def part_of(views: Views, rows: slice) -> Views:
    g = views.geometry
    return Views(
        full=views.full[rows],
        crops=views.crops[rows],
        geometry=CropGeometry(
            box_xyxy=g.box_xyxy[rows],
            crop_flips=g.crop_flips[rows],
            full_flips=g.full_flips[rows],
            full_size_hw=g.full_size_hw,
            crop_size_hw=g.crop_size_hw,
        ),
        valid=views.valid[rows],
        positions=views.positions[rows],
        epoch=views.epoch,
    )


VARIANTS = [("group", {}), ("group", {"symmetric": True, "shared_trunk": True, "crop_grid": 6}), ("sync_batch", {})]


def steps_on_rank(rank: int, world_size: int) -> list[dict]:
    """Metrics and some gradients of one step of each variant; all in one go, because starting processes is what costs."""
    torch.set_num_threads(1)
    return [step_on_rank(rank, world_size, norm, options) for norm, options in VARIANTS]


def step_on_rank(rank: int, world_size: int, norm: str, options: dict) -> dict:
    torch.manual_seed(0)
    settings = AnchorNTXentConfig(anchor_negatives=9, projection_dim=16, projector_hidden=16, **options)
    model = AnchorNTXent(settings, BackboneConfig(norm=norm), crop_size=32, seed=3)
    shares = {1: [7], 2: [4, 3], 3: [3, 2, 2]}[world_size]
    first = sum(shares[:rank])
    views = part_of(views_of(7, 2), slice(first, first + shares[rank]))
    wrapped = model if world_size == 1 else DistributedDataParallel(model)
    result = wrapped(views)
    result.loss.backward()
    names = ("trunk.body.conv1.weight", "pyramid.lateral.P4.weight", "projector.layers.0.weight")
    gradients = {n: p.grad for n, p in model.named_parameters() if n in names}
    return {"metrics": dict(result.metrics), "gradients": gradients}


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_loss_and_gradients_on_one_two_and_three_processes(world_size, tmp_path):
    alone = steps_on_rank(0, 1)
    ranks = run_on_ranks(steps_on_rank, world_size, tmp_path)
    for i, (norm, _) in enumerate(VARIANTS):
        # BatchNorm on a few values amplifies rounding; that its gradient is exact is tested in float64 with the norm itself.
        tolerance = 1e-5 if norm == "group" else 2e-2
        assert len(alone[i]["gradients"]) == 3
        for rank in ranks:
            loss = float(alone[i]["metrics"]["train/loss"])
            assert float(rank[i]["metrics"]["train/loss"]) == pytest.approx(loss, rel=1e-5)
            for name, gradient in alone[i]["gradients"].items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(rank[i]["gradients"][name], gradient, rtol=0, atol=tolerance * scale)


def test_a_level_of_one_cell_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"P7 is a single cell at views\.full_size=128"):
        AnchorNTXentConfig(levels=("P3", "P7")).check_views(128)
    AnchorNTXentConfig(levels=("P3", "P7"), anchor_negatives=0).check_views(128)
    AnchorNTXentConfig(levels=("P3", "P7")).check_views(256)
    with pytest.raises(ConfigError, match="distinct"):
        build(AnchorNTXentConfig, {"levels": ["P3", "P3"]})


def test_every_parameter_gets_a_gradient_on_every_choice_of_levels():
    for levels in (("P3", "P4", "P5"), ("P5",), ("P3", "P6"), ("P4", "P7")):
        settings = AnchorNTXentConfig(levels=levels, anchor_negatives=0, projection_dim=16, projector_hidden=16)
        model = AnchorNTXent(settings, BackboneConfig(), crop_size=32, seed=0)
        model(views_of(3, 2)).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_centred_embeddings_tell_crops_apart_from_the_first_step():
    views = views_of(4, 4)
    spread = {}
    for centred in (False, True):
        torch.manual_seed(0)
        settings = AnchorNTXentConfig(projection_dim=16, projector_hidden=16, center_embeddings=centred)
        model = AnchorNTXent(settings, BackboneConfig(), crop_size=32, seed=0).train()
        with torch.no_grad():
            crops = F.normalize(model.embed_crops(views.crops.flatten(0, 1)), dim=-1)
        spread[centred] = float((crops @ crops.T).mean())
    assert spread[False] > 0.5 and spread[True] < 0.2
    assert AnchorNTXent(settings, BackboneConfig(norm="group"), crop_size=32, seed=0).crop_center is None


def test_queries_of_another_size_are_resized_to_that_of_training():
    settings = AnchorNTXentConfig(projection_dim=16, projector_hidden=16, crop_stages=("C3", "C5"))
    model = AnchorNTXent(settings, BackboneConfig(), crop_size=32, seed=0).eval()
    crops = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.embed_crops(crops),
            model.embed_crops(F.interpolate(crops, size=(32, 32), mode="bilinear", antialias=True)),
        )
