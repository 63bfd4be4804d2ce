"""Pairs of views: pixels, boxes, regions and patches belong together, and draws depend on nothing but their key."""

import dataclasses

import pytest
import torch
import torchvision.transforms.v2.functional as F

from tests.oracles import detcon as oracle
from tests.workloads.data.views.test_crops import batch_of
from workloads.config import build
from workloads.data.views.crops import JitterConfig
from workloads.data.views.pairs import (
    ColumnRegionsConfig,
    GridRegionsConfig,
    PairViewsConfig,
    PatchesConfig,
    make_pair_views,
)
from workloads.data.views.photometric import PhotometricConfig, blur
from workloads.errors import ConfigError
from workloads.spec.pretrain import PretrainConfig

PLAIN = PhotometricConfig(jitter=JitterConfig(share=0.0), grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.0))


def ramps(height: int, width: int) -> torch.Tensor:
    """Red says how far right a pixel is, green how far down, in shares of the image."""
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    return (torch.stack([x, y, torch.zeros(height, width)]) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_view_is_torchvisions_resized_crop_of_its_box(flip):
    batch = batch_of(ramps(90, 120).expand(5, -1, -1, -1))
    settings = PairViewsConfig(view_size=64, horizontal_flip=flip, colours=PLAIN, area=(0.2, 0.9))
    views = make_pair_views(batch, settings, seed=1)
    for image in range(5):
        for view in range(2):
            x0, y0, x1, y1 = views.geometry.box_xyxy[image, view].tolist()
            assert 0 <= x0 < x1 <= 120.001 and 0 <= y0 < y1 <= 90.001
            mean = views.images[image, view, :2].mean((1, 2))
            expected = torch.tensor([(x0 + x1) / 240, (y0 + y1) / 180])
            torch.testing.assert_close(mean, expected, atol=6e-3, rtol=0)
            rises = views.images[image, view, 0, 32, 50] > views.images[image, view, 0, 32, 10]
            assert bool(rises) is (flip == 0.0)
    areas = (views.geometry.box_xyxy[..., 2:] - views.geometry.box_xyxy[..., :2]).prod(-1) / (90 * 120)
    assert (areas <= 0.9001).all() and areas.std() > 0.05
    assert views.geometry.flips[..., 0].float().mean() == flip


def test_boxes_of_whole_pixels_give_exactly_torchvisions_pixels():
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    settings = PairViewsConfig(view_size=32, horizontal_flip=0.0, colours=PLAIN, area=(1.0, 1.0), aspect=(1.0, 1.0))
    views = make_pair_views(batch_of(image), settings, seed=0)
    expected = F.resize(image[0].float() / 255, [32, 32], antialias=True)
    torch.testing.assert_close(views.images[0, 1], expected, atol=1e-5, rtol=1e-4)


def test_regions_are_where_their_pixels_are():
    """The mask says what the picture says: red names the column of a 4 × 4 grid, green its row."""
    height, width, grid = 96, 128, 4
    batch = batch_of(ramps(height, width).expand(16, -1, -1, -1))
    settings = PairViewsConfig(
        view_size=128, colours=PLAIN, area=(0.3, 1.0), regions=GridRegionsConfig(size=grid), horizontal_flip=0.5
    )
    views = make_pair_views(batch, settings, seed=2)
    assert views.regions.shape == (16, 2, 4, 4) and views.num_regions == 16
    centre = views.images[:, :, :2].unfold(3, 32, 32).unfold(4, 32, 32).mean((-2, -1))  # (B, 2, 2, 4, 4)
    column, row = (centre * grid).floor().clamp(max=grid - 1).unbind(2)
    near_an_edge = ((centre * grid - (centre * grid).round()).abs() < 0.1).any(2)
    expected = (1 + row * grid + column).long()
    assert torch.equal(views.regions[~near_an_edge], expected[~near_an_edge])
    assert (~near_an_edge).float().mean() > 0.4


def test_a_column_of_regions_equals_the_same_regions_made_on_the_fly_and_the_loops():
    height, width = 60, 80
    row = (2 * torch.arange(height) + 1) * 5 // (2 * height)
    column = (2 * torch.arange(width) + 1) * 5 // (2 * width)
    ids = torch.zeros(3, 80, 80, dtype=torch.int32)
    ids[:, :height, :width] = (1 + row[:, None] * 5 + column).int()
    images = torch.zeros(3, 3, 80, 80, dtype=torch.uint8)
    batch = dataclasses.replace(batch_of(images, [[height, width]] * 3), regions=ids, num_regions=25)
    grid = PairViewsConfig(view_size=64, colours=PLAIN, regions=GridRegionsConfig(size=5))
    stored = dataclasses.replace(grid, regions=ColumnRegionsConfig(name="any"))
    a, b = make_pair_views(batch, grid, seed=4), make_pair_views(batch, stored, seed=4)
    assert torch.equal(a.regions, b.regions)

    image, view = 1, 1
    x0, y0, x1, y1 = a.geometry.box_xyxy[image, view].tolist()
    mirrored = bool(a.geometry.flips[image, view, 0])
    pixels = [
        [
            int(
                ids[
                    image,
                    int(y0 + (i + 0.5) * (y1 - y0) / 64),
                    int(x0 + ((64 - j - 0.5) if mirrored else j + 0.5) * (x1 - x0) / 64),
                ]
            )
            for j in range(64)
        ]
        for i in range(64)
    ]
    assert b.regions[image, view].tolist() == oracle.cell_regions(pixels, 2)


def test_numbers_above_256_do_not_wrap_and_pixels_of_no_region_stay_so():
    ids = torch.zeros(2, 64, 64, dtype=torch.int32)
    ids[0] = 40_000
    batch = dataclasses.replace(batch_of(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), regions=ids, num_regions=40_000)
    settings = PairViewsConfig(view_size=32, colours=PLAIN, regions=ColumnRegionsConfig(name="any"))
    views = make_pair_views(batch, settings, seed=0)
    assert views.regions.flatten(1).tolist() == [[40_000] * 2, [0] * 2]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_patches_lie_in_their_cells_and_are_shuffled(flip):
    batch = batch_of(ramps(120, 120).expand(12, -1, -1, -1))
    patches = PatchesConfig(grid=3, view_size=96, size=16, area=(1.0, 1.0))
    settings = PairViewsConfig(view_size=32, colours=PLAIN, patches=patches, horizontal_flip=flip, aspect=(1.0, 1.0))
    views = make_pair_views(batch, settings, seed=5)
    assert views.patches.shape == (12, 2, 9, 3, 16, 16)
    place = views.patches[:, :, :, :2].mean((-2, -1))
    cell = (place * 3).floor().long()
    numbers = cell[..., 1] * 3 + cell[..., 0]
    assert torch.equal(numbers.sort(-1).values, torch.arange(9).expand(12, 2, 9))  # each cell once
    assert len({tuple(order) for order in numbers.flatten(0, 1).tolist()}) > 20  # in orders of their own
    spread = place - (cell + 0.5) / 3
    assert spread.abs().max() <= (32 - 16) / 2 / 96 + 0.01 and spread.std() > 0.02
    rises = views.patches[..., 0, 8, 15] > views.patches[..., 0, 8, 0]
    assert bool(rises.all()) is (flip == 0.0)


def test_blur_equals_torchvisions():
    images = torch.rand(2, 3, 40, 52)
    sigma = torch.tensor([0.7, 2.0])
    found = blur(images, sigma, 5)
    for i in range(2):
        expected = F.gaussian_blur(images[i], [11, 11], [float(sigma[i])] * 2)
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


def test_shares_of_blur_grey_and_solarisation_are_those_of_each_view():
    white = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    colours = PhotometricConfig(jitter=JitterConfig(share=0.0), grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.2))
    solarised = make_pair_views(batch_of(white), PairViewsConfig(view_size=32, colours=colours), seed=0).images
    share = (solarised.mean((2, 3, 4)) < 0.5).float().mean(0)
    assert share[0] == 0 and 0.13 < share[1] < 0.27
    noise = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8)
    box = {"area": (1.0, 1.0), "aspect": (1.0, 1.0), "view_size": 32}
    colours = dataclasses.replace(PLAIN, grey=0.2)
    greyed = make_pair_views(batch_of(noise), PairViewsConfig(colours=colours, **box), seed=0).images
    share = ((greyed[:, :, 0] - greyed[:, :, 1]).abs().amax((2, 3)) < 1e-5).float().mean(0)
    assert ((share > 0.13) & (share < 0.27)).all()
    colours = dataclasses.replace(PLAIN, blur=(1.0, 0.1), blur_sigma=(14.0, 14.0))
    blurred = make_pair_views(batch_of(noise), PairViewsConfig(colours=colours, **box), seed=0).images
    share = (blurred.std((2, 3, 4)) < 0.2).float().mean(0)
    assert share[0] == 1 and 0.04 < share[1] < 0.17


def test_the_same_image_gets_the_same_views_whoever_makes_them():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    settings = PairViewsConfig(view_size=32, regions=GridRegionsConfig(), patches=PatchesConfig(view_size=48, size=16))
    whole = make_pair_views(batch_of(images), settings, seed=3)
    for i in range(4):
        alone = make_pair_views(batch_of(images[i : i + 1], positions=torch.tensor([i])), settings, seed=3)
        for name in ("images", "patches", "regions"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[i], atol=1e-5, rtol=1e-5)
    later = make_pair_views(batch_of(images, epoch=1), settings, seed=3)
    assert not torch.equal(later.geometry.box_xyxy, whole.geometry.box_xyxy)
    assert torch.equal(whole.rows(slice(1, 3)).patches, whole.patches[1:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "ntxent"}}, r"views\.kind: ntxent needs pair, given crops; set views\.kind=pair"),
        ({"objective": {"kind": "detcon"}, "views": {"kind": "pair"}}, r"views\.regions: detcon needs regions"),
        ({"objective": {"kind": "detco"}, "views": {"kind": "pair"}}, r"views\.patches: detco needs patches"),
        ({"views": {"kind": "pair"}}, r"views\.kind: anchor_ntxent needs crops"),
        (
            {"objective": {"kind": "detco", "queue_size": 100}, "views": {"kind": "pair", "patches": {}}},
            r"objective\.queue_size: 100 is no multiple of global_batch_size=64",
        ),
        (
            {"views": {"kind": "pair", "patches": {"size": 90}}},
            r"views\.patches\.size: 90 does not fit into a cell of 85",
        ),
        ({"backbone": {"name": "vit_tiny"}}, r"backbone\.name: anchor_ntxent needs the stages of a ResNet"),
        ({"backbone": {"frozen": True}}, r"backbone\.frozen: only a pyramid can be trained on a frozen trunk"),
        ({"init_from": "a", "trunk_from": "b"}, "trunk_from: give either trunk_from or init_from"),
        ({"views": {"kind": "pair", "area": [0.5, 0.2]}}, r"views\.area: expected 0 < least <= largest"),
    ],
)
def test_what_does_not_fit_together_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(PretrainConfig, {"data": {"uri": "x"}, **changes})
