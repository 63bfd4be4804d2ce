"""Region masks on their way from a build to a batch: numbers survive, sizes fit, what is wrong is said."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from orchestrator.datasets.build import build_dataset
from orchestrator.datasets.region_figure import draw_regions
from orchestrator.datasets.verify import verify_dataset
from tests.places import SHARED_DATA
from tests.workloads.data.images import encoded, make_folder, picture, quarters
from workloads.config import build
from workloads.data.build.region_masks import (
    FelzenszwalbColumnConfig,
    RegionColumnsConfig,
    SlicColumnConfig,
    compute_regions,
)
from workloads.data.build.shards import BuildConfig
from workloads.data.loading.loaders import TrainLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.store.manifest import open_dataset
from workloads.data.store.region_codec import RegionsError, decode_regions, encode_regions, resize_regions
from workloads.data.store.row_groups import check_regions
from workloads.errors import DataError


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batch_of(uri: str, column: str, decode_size: int | None = 64):
    dataset = open_dataset(uri)
    plan = SamplePlan(dataset.row_groups.rows, dataset_sha256="0" * 64, seed=0, global_batch_size=dataset.num_images)
    loader = TrainLoader(dataset, plan, DataConfig(uri=uri, decode_size=decode_size), regions=column)
    batches = loader.iterate()
    try:
        return next(batches)
    finally:
        batches.close()


def test_sixteen_bits_survive_the_png():
    ids = np.array([[0, 1, 255], [256, 257, 65535]], dtype=np.int32)
    assert np.array_equal(decode_regions(encode_regions(ids)), ids)
    assert np.array_equal(decode_regions(encoded(Image.fromarray(ids.astype(np.uint8)), "PNG")), ids % 256)


@pytest.mark.parametrize("wrong", [b"no image", encoded(quarters(), "PNG"), b""])
def test_what_holds_no_numbers_is_refused(wrong):
    with pytest.raises(RegionsError):
        decode_regions(wrong)


def test_nearest_resizing_keeps_numbers_and_places():
    ids = np.kron(np.arange(1, 7).reshape(2, 3), np.ones((4, 4))).astype(np.int32)
    small = resize_regions(ids, (2, 3))
    assert small.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert np.array_equal(resize_regions(small, (8, 12)), ids)
    assert set(np.unique(resize_regions(ids, (5, 7)))) <= set(range(1, 7))


def test_segmentations_find_the_four_quarters():
    image = pixels_of(quarters(width=160, height=80))
    settings = RegionColumnsConfig(
        felzenszwalb=FelzenszwalbColumnConfig(scale=100, min_size=50), slic=SlicColumnConfig(segments=40)
    )
    found = compute_regions(image, "x", settings, None)
    for ids in found.values():
        corners = [int(ids[y, x]) for y in (20, 60) for x in (40, 120)]
        assert len(set(corners)) == 4 and ids.min() == 1


def test_a_build_with_grid_and_felzenszwalb_is_read_drawn_verified_and_rebuilt_alike(tmp_path):
    make_folder(tmp_path / "images", classes=2, per_class=4)
    given = {
        "source": {"kind": "folder", "inputs": [str(tmp_path / "images")]},
        "regions": {"grid": {"size": 3}, "felzenszwalb": {}},
    }
    manifests = [build_dataset(build(BuildConfig, given | {"output": str(tmp_path / name)})) for name in ("a", "b")]
    assert manifests[0].sha256 == manifests[1].sha256 and manifests[0].build["regions"]["grid"] == {"size": 3}
    batch = batch_of(str(tmp_path / "a"), "grid")
    assert batch.regions.shape == (8, 64, 64) and batch.num_regions == 9
    height, width = batch.content_hw[0].tolist()
    assert batch.regions[0, :height, :width].unique().tolist() == list(range(1, 10))
    assert not batch.regions[0, height:].any()
    assert batch.regions[0, 0, 0] == 1 and batch.regions[0, height - 1, width - 1] == 9
    shrunk = batch_of(str(tmp_path / "a"), "grid", decode_size=30)
    assert shrunk.regions.shape == (8, 30, 30) and shrunk.num_regions == 9
    assert draw_regions(str(tmp_path / "a"), str(tmp_path / "r.png")).stat().st_size > 1000
    assert "sound" in str(verify_dataset(str(tmp_path / "a")))
    with pytest.raises(DataError, match=r"has no regions 'slic', only grid, felzenszwalb; build it with"):
        check_regions(open_dataset(str(tmp_path / "a")), "slic")


def test_a_build_without_regions_is_what_it_was_before(tmp_path):
    make_folder(tmp_path / "images", classes=1, per_class=3)
    source = {"kind": "folder", "inputs": [str(tmp_path / "images")]}
    manifest = build_dataset(build(BuildConfig, {"source": source, "output": str(tmp_path / "a")}))
    assert "regions" not in manifest.build
    with pytest.raises(DataError, match="has no regions 'grid', none"):
        check_regions(open_dataset(str(tmp_path / "a")), "grid")


def panoptic_png(ids: np.ndarray) -> bytes:
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    return encoded(Image.fromarray(rgb), "PNG")


def test_panoptic_masks_are_numbered_without_gaps_shrunk_with_the_image_and_may_be_missing(tmp_path):
    make_folder(tmp_path / "images", classes=1, per_class=2)
    (tmp_path / "masks").mkdir()
    ids = np.zeros((48, 64), dtype=np.int64)
    ids[:, 20:40], ids[:, 40:] = 16_000_000, 70_000
    (tmp_path / "masks" / "000.png").write_bytes(panoptic_png(ids))
    given = {
        "source": {"kind": "folder", "inputs": [str(tmp_path / "images")]},
        "output": str(tmp_path / "a"),
        "short_side": 24,
        "regions": {"panoptic": {"masks": str(tmp_path / "masks")}},
    }
    build_dataset(build(BuildConfig, given))
    batch = batch_of(str(tmp_path / "a"), "panoptic")
    with_mask, without = (batch.image_ids.index(f"class_0/{name}.jpg") for name in ("000", "001"))
    assert batch.regions[with_mask, 12, [4, 15, 30]].tolist() == [0, 2, 1] and not batch.regions[without].any()


def test_a_mask_of_another_size_is_a_reject_that_says_so(tmp_path):
    make_folder(tmp_path / "images", classes=1, per_class=2)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "000.png").write_bytes(panoptic_png(np.ones((10, 10), dtype=np.int64)))
    given = {
        "source": {"kind": "folder", "inputs": [str(tmp_path / "images")]},
        "output": str(tmp_path / "a"),
        "regions": {"panoptic": {"masks": str(tmp_path / "masks")}},
    }
    manifest = build_dataset(build(BuildConfig, given))
    assert manifest.num_images == 1
    (reason,) = pq.read_table(tmp_path / "a" / "rejects.parquet")["reason"].to_pylist()
    assert reason == "regions: panoptic is 10x10 pixels, the image 64x48"


def test_a_column_of_another_dataset_is_taken_over(tmp_path):
    masks = [encode_regions(np.full((48, 64), 300 + i, dtype=np.int32)) for i in range(2)]
    images = [encoded(picture(i)) for i in range(2)]
    pq.write_table(pa.table({"image": images, "segments": masks}), tmp_path / "foreign.parquet")
    given = {
        "source": {"kind": "parquet", "inputs": [str(tmp_path / "foreign.parquet")]},
        "output": str(tmp_path / "a"),
        "regions": {"column": {"name": "segments"}},
    }
    build_dataset(build(BuildConfig, given))
    assert batch_of(str(tmp_path / "a"), "segments").regions.unique().tolist() == [0, 1]
    with pytest.raises(DataError, match=r"regions\.column: a folder source has no columns"):
        make_folder(tmp_path / "images", classes=1, per_class=2)
        folder = {"kind": "folder", "inputs": [str(tmp_path / "images")]}
        build_dataset(build(BuildConfig, given | {"source": folder, "output": str(tmp_path / "b")}))


def test_an_unreadable_mask_leaves_the_image_without_regions():
    from concurrent.futures import ThreadPoolExecutor

    from workloads.data.loading.decode import decode_regions_batch

    good = encode_regions(np.full((4, 6), 7, dtype=np.int32))
    with ThreadPoolExecutor(2) as pool:
        found, highest = decode_regions_batch(
            [good, b"torn", None, good],
            content_hw=torch.tensor([[4, 6], [4, 6], [4, 6], [0, 0]]),
            canvas_hw=(8, 8),
            pool=pool,
        )
    assert highest == 7 and found[0, :4, :6].eq(7).all() and int(found.sum()) == 7 * 24


@pytest.mark.skipif(
    not (SHARED_DATA / "coco" / "panoptic").is_dir(), reason="COCO's panoptic masks are not beside the checkout"
)
def test_cocos_own_masks_fit_its_images(tmp_path):
    names = sorted(p.stem for p in (SHARED_DATA / "coco" / "panoptic" / "panoptic_val2017").glob("*.png"))[:3]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(
            (SHARED_DATA / "coco" / "val2017" / f"{name}.jpg").read_bytes()
        )
    masks = str(SHARED_DATA / "coco" / "panoptic" / "panoptic_val2017")
    given = {
        "source": {"kind": "folder", "inputs": [str(tmp_path / "images")]},
        "output": str(tmp_path / "a"),
        "regions": {"panoptic": {"masks": masks}},
    }
    assert build_dataset(build(BuildConfig, given)).num_images == 3
    batch = batch_of(str(tmp_path / "a"), "panoptic", decode_size=None)
    with Image.open(io.BytesIO((Path(masks) / f"{names[0]}.png").read_bytes())) as png:
        colours = len(np.unique(np.asarray(png.convert("RGB")).reshape(-1, 3), axis=0))
    row = batch.image_ids.index(f"{names[0]}.jpg")
    assert len(batch.regions[row].unique()) == colours or batch.regions[row].unique()[0] != 0
    assert dataclasses.replace(batch).num_regions >= colours - 1
