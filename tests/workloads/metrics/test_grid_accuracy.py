"""SGA, RIGA, GAP-R against hand-computed cases and slow restatements; the protocol depends on nothing it should not."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.oracles import grid_accuracy as oracle
from tests.places import SHARED_DATA
from tests.workloads.data.views.test_crops import batch_of
from workloads.data.loading.decode import decode_batch
from workloads.errors import ConfigError
from workloads.metrics.bootstrap import interval
from workloads.metrics.grid_accuracy import (
    MEAN_MAP,
    GridAccuracyConfig,
    best_cell_is_in,
    calibrate,
    frozen_views,
    headline_figures,
    measure,
    merge,
    paired_difference,
    pixel_maps,
    summarize,
    with_mean_map,
    would_hit,
)
from workloads.models.backbone import BackboneConfig, Norm
from workloads.objectives.anchor_ntxent import AnchorNTXent, AnchorNTXentConfig

PROTOCOL = GridAccuracyConfig(crops_per_image=4, bootstrap=200, untrained_networks=2)


class Oracle:
    """Knows the answer: embeds a cell as its colour, and a crop as its mean colour, on images that say where they are."""

    def embed_grid(self, images):
        return {f"P{i}": torch.nn.functional.avg_pool2d(images, 2**i) - 0.5 for i in (3, 4, 5)}

    def embed_crops(self, crops):
        return crops.mean((-2, -1)) - 0.5


class Blind(Oracle):
    """Sees nothing: every cell is as similar as any other."""

    def embed_crops(self, crops):
        return torch.ones(len(crops), 3)

    def embed_grid(self, images):
        return {name: torch.ones_like(level) for name, level in super().embed_grid(images).items()}


def textured(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 12, 16, generator=g)
    image = torch.nn.functional.interpolate(coarse, size=(192, 256), mode="bicubic").clamp(0, 1)
    return (image * 255).to(torch.uint8)


def test_hits_equal_the_restatement():
    batch = batch_of(textured(5))
    views = frozen_views(batch, PROTOCOL, "plain")
    for grid in (16, 8, 4):
        maps = torch.rand(5, 4, grid, grid)
        reach = would_hit(views, (grid, grid))
        hits = best_cell_is_in(maps, reach)
        for b in range(5):
            for k in range(4):
                box = views.geometry.box_xyxy[b, k].tolist()
                row, column = oracle.best_cell(maps[b, k].tolist())
                assert bool(hits[b, k]) == oracle.counts(row, column, box, grid, 128)
                assert float(reach[b, k].float().mean()) == pytest.approx(oracle.chance(box, grid, 128))
                wholly = would_hit(views, (grid, grid), "strict")
                assert bool(best_cell_is_in(maps, wholly)[b, k]) == oracle.lies_wholly_inside(
                    row, column, box, grid, 128
                )


def test_ties_go_to_the_first_cell():
    maps = torch.zeros(1, 1, 4, 4)
    first = torch.zeros(1, 1, 16, dtype=torch.bool)
    first[..., 0] = True
    assert best_cell_is_in(maps, first).all()
    assert not best_cell_is_in(maps, ~first).any()


def test_mean_map_is_the_average_of_resized_levels_and_coarse_levels_are_not_scored():
    maps = {"P3": torch.rand(1, 1, 16, 16), "P6": torch.full((1, 1, 2, 2), 0.25)}
    joined = with_mean_map(maps, 16)
    assert list(joined) == ["P3", MEAN_MAP]
    torch.testing.assert_close(joined[MEAN_MAP], (maps["P3"] + 0.25) / 2)


def test_pixel_row_equals_the_restatement():
    batch = batch_of(textured(1))
    views = frozen_views(batch, PROTOCOL, "photometric")
    for window in (12, 20, 32):
        maps = pixel_maps(views, window, 16)
        for row, column in [(0, 0), (7, 3), (15, 15), (0, 9)]:
            expected = oracle.pixel_distance(
                views.crops[0, 1].tolist(), views.full[0].tolist(), window, 16, row, column
            )
            assert -float(maps[0, 1, row, column]) == pytest.approx(expected, abs=2e-4)


def test_suites_share_their_boxes_and_differ_only_in_the_query():
    batch = batch_of(textured(3))
    plain, photometric = (frozen_views(batch, PROTOCOL, suite) for suite in ("plain", "photometric"))
    assert torch.equal(plain.geometry.box_xyxy, photometric.geometry.box_xyxy)
    assert torch.equal(plain.full, photometric.full)
    assert (plain.crops - photometric.crops).abs().max() > 0.05


@pytest.mark.parametrize("knobs", [{"crop_grid": 4}, {"anchor_negatives": 0}, {"temperature": 1.0, "symmetric": True}])
def test_an_untrained_network_scores_the_same_whatever_it_will_be_trained_with(knobs):
    """Else a sweep over the grid would rank by how easy the grid makes the question."""
    tables = []
    for changes in ({}, knobs):
        torch.manual_seed(0)
        objective = AnchorNTXentConfig(projection_dim=16, projector_hidden=16, crop_stages=("C2",), **changes)
        network = AnchorNTXent(objective, BackboneConfig(), crop_size=32, seed=0).eval()
        tables.append(merge([measure(network, [], lambda: iter([batch_of(textured(3))]), PROTOCOL)]))
    usual, changed = tables
    for suite in usual:
        for name, column in usual[suite].items():
            np.testing.assert_array_equal(changed[suite][name], column)
    assert summarize(usual, PROTOCOL) == summarize(changed, PROTOCOL)


def test_queries_depend_on_the_image_id_alone():
    batch = batch_of(textured(4))
    alone = batch_of(textured(4)[2:3])
    object.__setattr__(alone, "image_ids", batch.image_ids[2:3])
    object.__setattr__(alone, "epoch", 7)
    whole, one = frozen_views(batch, PROTOCOL, "plain"), frozen_views(alone, PROTOCOL, "plain")
    assert torch.equal(whole.geometry.box_xyxy[2:3], one.geometry.box_xyxy)
    # No argument of the protocol's functions can carry a training knob.
    for function in (frozen_views, measure, summarize):
        assert "objective" not in str(inspect.signature(function)).lower()


def ramps(n: int) -> torch.Tensor:
    """Images that say where they are: red grows with x, green with y."""
    x, y = torch.linspace(0, 255, 256).expand(192, 256), torch.linspace(0, 255, 192)[:, None].expand(192, 256)
    return torch.stack([x, y, torch.full((192, 256), 200.0)]).to(torch.uint8).expand(n, -1, -1, -1)


def run(model, others=(), n=6, sizes=(6,), images=None):
    images = textured(n) if images is None else images
    whole = batch_of(images)
    parts, first = [], 0
    for size in sizes:
        part = batch_of(images[first : first + size])
        object.__setattr__(part, "image_ids", whole.image_ids[first : first + size])
        parts.append(part)
        first += size
    return parts, measure(model, others, lambda: parts, PROTOCOL)


def test_a_model_that_knows_hits_and_one_that_is_blind_does_not():
    _, tables = run(Oracle(), [Blind(), Blind()], images=ramps(6))
    figures = summarize(tables, PROTOCOL)
    assert figures["eval/sga"] > 0.6
    assert figures["eval/riga"] < 0.2
    assert figures["eval/sga_strict"] <= figures["eval/sga"]
    assert 0.02 < figures["eval/chance"] < 0.08
    assert figures["eval/pixel"] == max(float(c.mean()) for n, c in tables["plain"].items() if n.startswith("pixel_"))
    assert figures["eval/sga_low"] <= figures["eval/sga"] <= figures["eval/sga_high"]
    assert figures["eval/gain"] == pytest.approx(figures["eval/sga"] - figures["eval/pixel"])
    assert figures["eval/over_chance"] == pytest.approx(figures["eval/sga"] / figures["eval/chance"])
    assert "eval/photometric/sga" in figures
    if figures["eval/riga"] > 0:
        assert figures["eval/gap_r"] == pytest.approx(figures["eval/sga"] / figures["eval/riga"])
    else:
        assert "eval/gap_r" not in figures


def test_figures_by_hand() -> None:
    table = {
        "sga": np.array([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=np.float32),  # 6 of 8
        "sga_strict": np.array([[1, 0], [0, 0], [0, 1], [0, 0]], dtype=np.float32),  # 2 of 8
        "sga_p3": np.array([[1, 0], [0, 0], [0, 0], [1, 0]], dtype=np.float32),
        "sga_strict_p3": np.zeros((4, 2), np.float32),
        "chance": np.full((4, 2), 0.05, np.float32),
        "chance_strict": np.full((4, 2), 0.025, np.float32),
        "chance_p3": np.full((4, 2), 0.05, np.float32),
        "chance_strict_p3": np.zeros((4, 2), np.float32),
        "pixel_16": np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32),
        "pixel_24": np.array([[1, 0], [1, 0], [0, 0], [0, 0]], np.float32),
        "pixel_strict_16": np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32),
        "pixel_strict_24": np.zeros((4, 2), np.float32),
        "riga_0": np.array([[0, 0], [1, 0], [0, 0], [0, 0]], np.float32),
        "riga_1": np.array([[0, 0], [0, 0], [0, 0], [1, 1]], np.float32),
        "riga_strict_0": np.array([[0, 0], [1, 0], [0, 0], [0, 0]], np.float32),
        "riga_strict_1": np.zeros((4, 2), np.float32),
        "riga_p3_0": np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32),
        "riga_p3_1": np.zeros((4, 2), np.float32),
        "riga_strict_p3_0": np.zeros((4, 2), np.float32),
        "riga_strict_p3_1": np.zeros((4, 2), np.float32),
        "riga_initial_0": np.zeros((4, 2), np.float32),
        "riga_initial_1": np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32),
        "image": np.arange(4)[:, None],
    }
    protocol = GridAccuracyConfig(levels=("P3",), pixel_windows=(16, 24), bootstrap=200, untrained_networks=2)
    figures = summarize({"plain": table}, protocol)
    assert figures["eval/sga"] == 0.75 and figures["eval/riga"] == pytest.approx(3 / 16)
    assert figures["eval/gap_r"] == pytest.approx(4.0)
    assert figures["eval/sga_strict"] == 0.25 and figures["eval/riga_strict"] == pytest.approx(1 / 16)
    assert figures["eval/gap_r_strict"] == pytest.approx(4.0)
    assert figures["eval/sga_p3"] == 0.25 and figures["eval/gap_r_p3"] == pytest.approx(0.25 / (1 / 16))
    assert figures["eval/pixel"] == 0.25 and figures["eval/pixel_window"] == 24
    assert figures["eval/pixel_strict"] == 0.125 and figures["eval/pixel_window_strict"] == 16  # the best by this rule
    assert figures["eval/gain_strict"] == pytest.approx(0.125)
    assert figures["eval/over_chance"] == pytest.approx(15.0)
    assert figures["eval/over_chance_strict"] == pytest.approx(10.0)
    assert figures["eval/riga_initial"] == pytest.approx(1 / 16)
    # No cell of P3 can hit by the strict rule, and no untrained network does: no ratio is made up.
    assert figures["eval/sga_strict_p3"] == 0.0 and figures["eval/chance_strict_p3"] == 0.0
    assert not {"eval/over_chance_strict_p3", "eval/gap_r_strict_p3"} & figures.keys()
    for name in ("sga", "sga_strict", "sga_p3", "riga", "riga_strict", "gain", "gain_strict"):
        assert figures[f"eval/{name}_low"] <= figures[f"eval/{name}"] <= figures[f"eval/{name}_high"]
    charts = headline_figures(figures)
    assert "eval/sga_p3_low" in figures and "eval/sga_p3_low" not in charts
    assert "eval/sga_low" in charts and "eval/gap_r_low" in charts and "eval/sga_p3" in charts


def small_network(norm: Norm = "batch", *, center: bool = True, shared: bool = False) -> AnchorNTXent:
    torch.manual_seed(3)
    objective = AnchorNTXentConfig(
        projection_dim=16, projector_hidden=16, crop_stages=("C2",), center_embeddings=center, shared_trunk=shared
    )
    return AnchorNTXent(objective, BackboneConfig(norm=norm), crop_size=64, seed=0).eval()


def test_calibration_is_the_mean_of_the_batches_statistics() -> None:
    batches = [batch_of(textured(2, seed)) for seed in (0, 1, 2)]
    network, plain = small_network(), small_network()
    inputs: list[torch.Tensor] = []
    first = plain.trunk.body.bn1
    first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    calibrate(network, batches, PROTOCOL)
    with torch.no_grad():
        for batch in batches:
            plain.embed_grid(frozen_views(batch, PROTOCOL, "plain").full)
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in inputs]).mean(0)
    torch.testing.assert_close(network.trunk.body.bn1.running_mean, means)
    torch.testing.assert_close(network.trunk.body.bn1.running_var, variances)
    assert not any(module.training for module in network.modules())
    assert network.trunk.body.bn1.momentum == plain.trunk.body.bn1.momentum


def test_calibration_of_a_shared_trunk_is_the_mean_over_full_views_and_crops() -> None:
    batches = [batch_of(textured(2, seed)) for seed in (0, 1)]
    network, plain = small_network(shared=True), small_network(shared=True)
    inputs: list[torch.Tensor] = []
    plain.trunk.body.bn1.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    calibrate(network, batches, PROTOCOL)
    with torch.no_grad():
        for batch in batches:
            views = frozen_views(batch, PROTOCOL, "plain")
            plain.embed_grid(views.full)
            plain.embed_crops(views.crops.flatten(0, 1))
    assert len(inputs) == 4
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(network.trunk.body.bn1.running_mean, means)


def test_padding_does_not_change_the_calibration_and_networks_without_batch_norm_stay() -> None:
    batch = batch_of(textured(3))
    padded = batch_of(torch.cat([textured(3), torch.zeros(2, 3, 192, 256, dtype=torch.uint8)]))
    object.__setattr__(padded, "valid", torch.tensor([True, True, True, False, False]))
    networks = [small_network(), small_network()]
    for network, images in zip(networks, (batch, padded), strict=True):
        calibrate(network, [images], PROTOCOL)
    for a, b in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)
    grouped = small_network("group", center=False)
    before = {name: value.clone() for name, value in grouped.state_dict().items()}
    calibrate(grouped, [batch], PROTOCOL)
    assert all(torch.equal(before[name], value) for name, value in grouped.state_dict().items())


def test_padding_counts_nowhere_and_shares_do_not_matter():
    _, whole = run(Oracle())
    parts, _ = run(Oracle(), sizes=(4, 2))
    padded = parts[1]
    noise = torch.randint(0, 256, (3, 3, 192, 256), dtype=torch.uint8)
    for name, rows in (
        ("images", noise),
        ("content_hw", padded.content_hw[:1].expand(3, 2)),
        ("positions", torch.zeros(3).long()),
    ):
        object.__setattr__(padded, name, torch.cat([getattr(padded, name), rows]))
    object.__setattr__(padded, "valid", torch.tensor([True, True, False, False, False]))
    object.__setattr__(padded, "image_ids", (*padded.image_ids, "", "", ""))
    shares = [measure(Oracle(), [], lambda part=part: [part], PROTOCOL) for part in (padded, parts[0])]
    joined, ordered = merge(shares), merge([whole])
    for suite in whole:
        for name in whole[suite]:
            np.testing.assert_array_equal(joined[suite][name], ordered[suite][name])


def test_interval_narrows_with_images_and_pairs_what_is_paired():
    g = np.random.default_rng(0)
    wide, narrow = (
        interval(lambda w, v=g.random(n): w @ v / w.sum(1), n, seed=0, resamples=PROTOCOL.bootstrap) for n in (20, 2000)
    )
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    hits = (g.random((50, 4)) < 0.5).astype(np.float32)
    better = np.maximum(hits, (g.random((50, 4)) < 0.1).astype(np.float32))
    mean, low, high = paired_difference(better, hits, PROTOCOL)
    assert low <= mean <= high and low >= 0 and mean == pytest.approx(float((better - hits).mean()))
    assert paired_difference(hits, hits, PROTOCOL) == (0.0, 0.0, 0.0)


def test_a_level_that_the_model_lacks_is_named():
    protocol = GridAccuracyConfig(levels=("P3", "P7"))
    with pytest.raises(ConfigError, match="P7"):
        measure(Oracle(), [], lambda: [batch_of(textured(1))], protocol)


COCO = SHARED_DATA / "coco" / "val2017"


@pytest.mark.skipif(not COCO.is_dir(), reason="../shared/data/coco/val2017 is not beside this checkout")
def test_on_photographs_chance_is_low_and_colour_alone_finds_half_of_the_plain_queries():
    """Known of COCO val by this protocol: chance 4.3 %; `pixel` 50–62 % plain and about 20 % photometric."""
    files = sorted(COCO.glob("*.jpg"))[:24]
    with ThreadPoolExecutor(2) as pool:
        images, content_hw, _, valid = decode_batch([f.read_bytes() for f in files], decode_size=None, pool=pool)
    assert valid.all()
    batch = batch_of(images, content_hw)
    figures = summarize(measure(Blind(), [], lambda: [batch], GridAccuracyConfig(untrained_networks=0)), PROTOCOL)
    assert 0.038 < figures["eval/chance"] < 0.048
    assert 0.4 < figures["eval/pixel"] < 0.75
    assert 0.1 < figures["eval/photometric/pixel"] < 0.35
    assert figures["eval/sga"] < 0.15
