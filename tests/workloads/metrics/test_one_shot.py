"""One-shot detection: AP against pycocotools query by query, boxes at peaks by hand, a model that knows and one that does not."""

import numpy as np
import pytest
import torch
from PIL import Image

from workloads.config import build
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import Objects, read_objects
from workloads.metrics.average_precision import DetectionTable, Truth, average_precision
from workloads.metrics.corloc import iou_of
from workloads.metrics.one_shot import (
    OneShotConfig,
    TrunkMatcher,
    average_precision_50,
    boxes_at_peaks,
    choose_queries,
    crops_of,
    full_views,
    measure,
    summarize,
)
from workloads.metrics.retrieval import gallery_queries, most_similar
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.reports.gallery import draw_gallery

SMALL = OneShotConfig(view_size=64, crop_size=16, grid=16, least_side=8, pixel_windows=(8, 16), resamples=100)


def batches_of(uri: str, size: int = 5):
    def one_pass():
        yield from EvalLoader(open_dataset(uri), DataConfig(uri=uri, decode_size=None), batch_size=size)

    return one_pass


class Colours(torch.nn.Module):
    """Knows colours: the red and the blue excess of a cell, and of a crop; grey is neither."""

    def embed_grid(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = torch.nn.functional.avg_pool2d(images, 4)
        return {"P3": self.excess(pooled)}

    def embed_crops(self, crops: torch.Tensor) -> torch.Tensor:
        return self.excess(crops.mean((-2, -1), keepdim=True)).flatten(1)

    @staticmethod
    def excess(pixels: torch.Tensor) -> torch.Tensor:
        red, green, blue = pixels.unbind(1)
        return torch.stack([red - green, blue - green, torch.full_like(red, 0.1)], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_pycocotools_query_by_query(seed):
    rng = np.random.default_rng(seed)
    boxes, scores, truths = [], [], []
    for _ in range(8):
        corner = rng.uniform(0, 150, (rng.integers(1, 5), 2))
        truth = np.concatenate([corner, corner + rng.uniform(10, 90, corner.shape)], axis=1).round(1)
        found = truth[rng.integers(0, len(truth), 6)] + rng.normal(0, 5, (6, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        count = int(rng.integers(0, 7))
        boxes.append(found)
        scores.append(np.where(np.arange(6) < count, -np.sort(-rng.random(6)), -np.inf))
        truths.append(truth)
    padded = torch.zeros(8, 4, 4, dtype=torch.float64)
    for row, truth in zip(padded, truths, strict=True):
        row[: len(truth)] = torch.from_numpy(truth)
    asked = torch.arange(4)[None] < torch.tensor([len(t) for t in truths])[:, None]
    ours = average_precision_50(torch.from_numpy(np.stack(boxes)), torch.from_numpy(np.stack(scores)), padded, asked)
    expected = []
    for found, score, truth in zip(boxes, scores, truths, strict=True):
        kept = np.isfinite(score)
        table = DetectionTable(
            image=np.zeros(kept.sum(), dtype=np.int64),
            boxes_xyxy=found[kept],
            scores=score[kept],
            labels=np.ones(kept.sum(), dtype=np.int64),
        )
        nothing = np.zeros(len(truth), dtype=bool)
        item = Objects(
            size_hw=(400, 400), boxes_xyxy=truth, categories=("a",) * len(truth), crowd=nothing, difficult=nothing
        )
        expected.append(average_precision(table, Truth(objects=[item], labels={"a": 1}))["ap50"])
    assert ours.tolist() == pytest.approx(expected, abs=1e-9)
    assert 0 < np.mean(expected) < 1


def test_boxes_stand_on_peaks_have_the_querys_size_and_do_not_overlap():
    maps = torch.zeros(2, 16, 16)
    maps[0, 8, 8], maps[0, 8, 10], maps[0, 2, 3] = 1.0, 0.9, 0.8
    maps[1, 0, 15] = 0.5
    protocol = OneShotConfig(view_size=64, grid=16, peaks=3, nms_threshold=0.4)
    boxes, scores = boxes_at_peaks(maps, torch.tensor([[20.0, 12.0], [16.0, 16.0]]), protocol)
    assert boxes[0, 0].tolist() == [24, 28, 44, 40] and scores[0, 0] == 1.0
    assert boxes[0, 1].tolist() == [4, 4, 24, 16] and scores[0, 1] == pytest.approx(
        0.8
    )  # the near one, IoU 3/7, is suppressed
    assert boxes[1, 0].tolist() == [54, 0, 64, 10]  # clipped at the corner
    loose, _ = boxes_at_peaks(
        maps, torch.tensor([[20.0, 12.0]] * 2), OneShotConfig(view_size=64, grid=16, nms_threshold=0.5)
    )
    assert loose[0, 1].tolist() == [32, 28, 52, 40]
    flat, scores = boxes_at_peaks(torch.zeros(1, 16, 16), torch.tensor([[64.0, 64.0]]), protocol)
    assert torch.isfinite(scores).any() and torch.isfinite(flat).all()  # all cells tie


@pytest.mark.parametrize("queries", [3, 60])  # torchvision suppresses few boxes and many in different ways
def test_peaks_are_suppressed_as_by_a_plain_loop(queries):
    generator = torch.Generator().manual_seed(queries)
    maps = torch.randint(0, 50, (queries, 16, 16), generator=generator) / 50  # many ties
    size = torch.rand(queries, 2, generator=generator) * 40 + 2
    boxes, scores = boxes_at_peaks(maps, size, SMALL)
    neighbourhood = torch.nn.functional.max_pool2d(maps[:, None], 3, 1, 1)[:, 0]
    for q in range(queries):
        kept: list[tuple[float, list[float]]] = []
        peaks = [
            (float(maps[q, r, c]), r, c)
            for r in range(16)
            for c in range(16)
            if maps[q, r, c] == neighbourhood[q, r, c]
        ]
        for score, row, column in sorted(peaks, key=lambda peak: -peak[0])[:40]:  # four looked at for each box
            middle, half = np.array([4 * column + 2, 4 * row + 2]), size[q].numpy() / 2
            box = np.concatenate([middle - half, middle + half]).clip(0, 64)
            if all(iou_of(box[None], np.array([other]))[0, 0] <= SMALL.nms_threshold for _, other in kept):
                kept.append((score, box.tolist()))
        kept = kept[: SMALL.peaks]
        assert scores[q, : len(kept)].tolist() == [pytest.approx(score) for score, _ in kept]
        assert boxes[q, : len(kept)].flatten().tolist() == pytest.approx(
            [side for _, box in kept for side in box], abs=1e-4
        )
        assert torch.isinf(scores[q, len(kept) :]).all()


def test_queries_are_of_another_image_and_the_same_whatever_else_is_there(coco):
    objects = read_objects(open_dataset(coco["val"]))
    queries = choose_queries(objects, SMALL)
    assert len(queries) == sum(len(set(item.categories)) for item in objects.values())
    items = list(objects.values())
    for query in queries:
        assert query.image != query.target and query.category in items[query.target].categories
        boxes = items[query.image].boxes_xyxy.tolist()
        assert items[query.image].categories[boxes.index(list(query.box_xyxy))] == query.category
    assert queries == choose_queries(objects, SMALL)
    assert queries != choose_queries(objects, OneShotConfig(least_side=8, seed=1))
    assert {q.category for q in choose_queries(objects, OneShotConfig(least_side=15))} == {"square"}  # a bar is 10 high
    alone = {name: item for name, item in list(objects.items()) if len(item.boxes_xyxy)}
    assert choose_queries(dict([next(iter(alone.items()))]), SMALL) == []


def test_crops_and_views_are_what_pillow_cuts_and_stretches(coco):
    batch = next(iter(batches_of(coco["val"])()))
    box = (8.0, 4.0, 48.0, 44.0)
    crop = crops_of(batch, torch.tensor([2]), torch.tensor([box]), 20)[0]
    h, w = batch.content_hw[2].tolist()
    source = Image.fromarray(batch.images[2, :, :h, :w].permute(1, 2, 0).numpy())
    expected = source.crop([int(v) for v in box]).resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(crop.permute(1, 2, 0), np.asarray(expected) / 255, atol=0.006)
    expected = source.resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(full_views(batch, 64)[2].permute(1, 2, 0), np.asarray(expected) / 255, atol=0.006)


def test_a_model_that_knows_finds_every_object_and_one_that_does_not_is_told_apart(coco):
    objects = read_objects(open_dataset(coco["val"]))
    torch.manual_seed(0)
    untrained = TrunkMatcher(Trunk(BackboneConfig()), "C2").eval()
    models = {"model": Colours(), "untrained_0": untrained}
    table = measure(models, batches_of(coco["val"]), objects, SMALL)
    figures = summarize(table, SMALL)
    # All cells within a square are alike to it, so its box may stand on any of them: AP is not 1.
    assert figures["eval/one_shot/pointing"] == 1.0
    assert figures["eval/one_shot/ap50"] > figures["eval/one_shot/center_ap50"] + 0.1
    assert figures["eval/one_shot/queries"] == len(choose_queries(objects, SMALL))
    assert figures["eval/one_shot/center_pointing"] < 0.5
    over = "eval/one_shot/pointing_over_center"
    assert figures[over] == pytest.approx(1 - figures["eval/one_shot/center_pointing"])
    assert 0 < figures[f"{over}_low"] <= figures[over] <= figures[f"{over}_high"]
    assert figures["eval/one_shot/pixel_pointing"] > 0.5  # colours are all that there is here
    other = measure(models, batches_of(coco["val"], size=16), objects, SMALL)
    for name in table.ap50:
        np.testing.assert_allclose(table.ap50[name], other.ap50[name], atol=1e-6)
        np.testing.assert_array_equal(table.pointing[name], other.pointing[name])


def test_the_most_similar_regions_lie_on_the_querys_category(coco, tmp_path):
    objects = read_objects(open_dataset(coco["val"]))
    queries = gallery_queries(objects, SMALL, 5)
    assert [query.category for query in queries] == ["square", "bar"]
    found = most_similar(Colours(), batches_of(coco["val"]), objects, queries, SMALL, top=4)
    for query, regions in zip(queries, found, strict=True):
        assert len(regions) == 4 and query.image not in {region.image for region in regions}
        assert len({region.image for region in regions}) == 4 and all(region.is_same for region in regions)
        assert [r.similarity for r in regions] == sorted((r.similarity for r in regions), reverse=True)
    pixels = {i: np.zeros((80, 96, 3), dtype=np.uint8) for i in range(16)}
    draw_gallery(list(zip(queries, found, strict=True)), pixels, tmp_path / "gallery.png", title="x")
    assert Image.open(tmp_path / "gallery.png").size[0] > 5 * 144


def test_the_command_measures_a_checkpoint_beside_its_baselines(coco, tmp_path, caplog):
    import json

    from workloads.__main__ import main
    from workloads.loops.pretrain import pretrain
    from workloads.parallel.runtime import LocalRuntime
    from workloads.spec.pretrain import PretrainConfig

    data = {
        "steps": 1, "global_batch_size": 4, "data": {"uri": coco["train"]},
        "views": {"full_size": 64, "crop_size": 16, "crops_per_image": 2},
        "objective": {"levels": ["P3"], "projection_dim": 16, "projector_hidden": 16},
    }  # fmt: skip
    pretrain(build(PretrainConfig, data), LocalRuntime(tmp_path / "run"))
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    keys = ["protocol.view_size=64", "protocol.crop_size=16", "protocol.grid=16", "protocol.least_side=8"]
    keys += [
        "protocol.untrained_networks=1",
        "protocol.resamples=50",
        "gallery=2",
        "top=3",
        "protocol.pixel_windows=[8]",
    ]
    output = ["--output", str(tmp_path / "out")]
    assert main(["one-shot", str(checkpoint), f"uri={coco['val']}", *keys, *output]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {f"eval/one_shot/{n}ap50" for n in ("", "pixel_", "center_", "untrained_")} <= record.keys()
    gallery = tmp_path / "out" / "artifacts" / "gallery"
    assert (gallery / "step_0000001.png").is_file()
    assert len((gallery / "step_0000001.csv").read_text().splitlines()) == 1 + 2 * 3
    assert main(["one-shot", str(checkpoint), *output]) == 2 and "uri" in caplog.text
    assert main(["one-shot", str(tmp_path / "no"), f"uri={coco['val']}", *output]) == 2
