"""Batches hold what the plan says, whatever is broken, and leave nothing behind."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.datasets.build import build_dataset
from tests.places import SHARED_DATA
from tests.workloads.data.images import encoded, picture
from workloads.config import build
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import CocoSourceConfig, FolderSourceConfig
from workloads.data.loading.loaders import EvalLoader, TrainLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.row_groups import RowGroupReader
from workloads.errors import ConfigError, DataError
from workloads.types import ImageBatch


def make_plan(dataset: Dataset, global_batch_size: int = 10, lanes: int | None = None) -> SamplePlan:
    return SamplePlan(
        dataset.row_groups.rows,
        dataset_sha256=dataset.manifest.sha256,
        seed=3,
        global_batch_size=global_batch_size,
        lanes=lanes,
    )


def make_loader(dataset: Dataset, plan: SamplePlan, rank: int = 0, world_size: int = 1, **options) -> TrainLoader:
    config = DataConfig(uri=dataset.uri, **{"decode_size": 64, **options})
    return TrainLoader(dataset, plan, config, rank=rank, world_size=world_size)


def take(loader: TrainLoader, count: int, start_step: int = 0) -> list[ImageBatch]:
    batches = loader.iterate(start_step)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def expected_pixels(image_id: str) -> np.ndarray:
    label, index = image_id.removeprefix("class_").removesuffix(".jpg").split("/")
    return np.asarray(picture(1000 * int(label) + int(index))).astype(int)


def test_an_epoch_is_every_image_once_with_its_own_pixels(dataset):
    plan = make_plan(dataset, 12)
    batches = take(make_loader(dataset, plan), plan.steps_per_epoch)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    assert len(set(ids)) == len(ids) == 48
    assert [p for batch in batches for p in batch.positions.tolist()] == list(range(48))
    for batch in batches:
        assert batch.valid.all()
        assert batch.images.shape == (12, 3, 64, 64)
        assert batch.content_hw.tolist() == [[48, 64]] * 12
        for image, image_id in zip(batch.images, batch.image_ids, strict=True):
            difference = np.abs(image[:, :48].permute(1, 2, 0).numpy().astype(int) - expected_pixels(image_id))
            assert difference.max() < 25


def test_starting_at_a_step_equals_walking_there(dataset):
    plan = make_plan(dataset)
    walked = take(make_loader(dataset, plan), 9)
    sought = take(make_loader(dataset, plan), 2, start_step=7)
    assert plan.steps_per_epoch == 4
    for one, other in zip(walked[7:], sought, strict=True):
        assert (one.epoch, one.image_ids) == (other.epoch, other.image_ids)
        assert torch.equal(one.images, other.images)
    assert [batch.epoch for batch in walked] == [0] * 4 + [1] * 4 + [2]


def test_ranks_together_hold_the_batch_of_one(dataset):
    plan = make_plan(dataset, 10, lanes=5)
    alone = take(make_loader(dataset, plan), 4)
    ranks = [take(make_loader(dataset, plan, rank, 3), 4) for rank in range(3)]
    for step, whole in enumerate(alone):
        together = {
            int(position): image_id
            for batches in ranks
            for position, image_id in zip(batches[step].positions, batches[step].image_ids, strict=True)
        }
        assert together == dict(zip(whole.positions.tolist(), whole.image_ids, strict=True))
        sizes = [len(batches[step].image_ids) for batches in ranks]
        assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_leaves_no_thread(dataset, taken):
    before = set(threading.enumerate())
    take(make_loader(dataset, make_plan(dataset)), taken)
    assert set(threading.enumerate()) == before


def test_each_row_group_is_fetched_once_a_lane(dataset, monkeypatch):
    fetched = []
    read = RowGroupReader.read
    monkeypatch.setattr(RowGroupReader, "read", lambda self, group: (fetched.append(group), read(self, group))[1])
    plan = make_plan(dataset, 12, lanes=4)
    take(make_loader(dataset, plan, prefetch_batches=0), plan.steps_per_epoch)
    first_epoch = fetched[: len(dataset.row_groups) + plan.lanes]
    assert set(first_epoch) == set(range(len(dataset.row_groups)))
    assert len(fetched) < 3 * (len(dataset.row_groups) + plan.lanes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 20, 1])
def test_evaluation_sees_each_image_once_and_ranks_agree_on_batches(dataset, world_size, limit):
    config = DataConfig(uri=dataset.uri, decode_size=32)
    loaders = [
        EvalLoader(dataset, config, batch_size=7, rank=rank, world_size=world_size, limit=limit)
        for rank in range(world_size)
    ]
    ids = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == len(loaders[0])
        for batch in batches:
            assert len(batch.image_ids) == len(batch.valid) == 7
            assert [bool(image_id) for image_id in batch.image_ids] == batch.valid.tolist()
            ids += [image_id for image_id in batch.image_ids if image_id]
    everything = list(read_annotations(dataset))
    assert ids == everything[: limit or 48]


def test_annotations_of_class_folders(dataset):
    annotations = read_annotations(dataset)["class_2/003.jpg"]
    assert annotations.label == "class_2"
    assert annotations.size_hw == (48, 64)
    assert annotations.boxes_xyxy.shape == (0, 4)


@pytest.fixture
def spoilt(dataset, tmp_path) -> Dataset:
    """The dataset with two images whose bytes no longer decode though their row groups are sound."""
    import pyarrow.parquet as pq

    copy = tmp_path / "spoilt"
    shutil.copytree(dataset.root, copy)
    opened = open_dataset(str(copy))
    table = pq.read_table(copy / "shard-000000.parquet")
    target = table["image"][0]["bytes"].as_py()
    data = (copy / "shard-000000.parquet").read_bytes()
    at = data.index(target)
    broken = data[:at] + b"\0" * 200 + data[at + 200 :]
    (copy / "shard-000000.parquet").write_bytes(broken)
    return opened


def test_a_damaged_row_group_is_an_error_that_names_the_shard(spoilt):
    with pytest.raises(DataError, match=r"shard-000000\.parquet.*cannot be read"):
        take(make_loader(spoilt, make_plan(spoilt)), 4)


def bad_rows_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    from workloads.data.build import rows

    source = tmp_path / "source"
    source.mkdir()
    for index in range(20):
        (source / f"{index:02d}.jpg").write_bytes(encoded(picture(index)))
    (source / "07.jpg").write_bytes(encoded(picture(7))[:-300])
    with monkeypatch.context() as patch:  # a row that was sound when it was built
        patch.setattr(rows, "decode_image", lambda data: torch.zeros(3, 48, 64, dtype=torch.uint8))
        output = tmp_path / "dataset"
        build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(source),)), output=str(output)))
    return open_dataset(str(output))


def test_undecodable_rows_are_masked_counted_and_logged(tmp_path, monkeypatch, caplog):
    opened = bad_rows_dataset(tmp_path, monkeypatch)
    loader = make_loader(opened, make_plan(opened), max_bad_share=0.05)
    batches = take(loader, 4)
    bad = [batch.image_ids[i] for batch in batches for i in range(10) if not batch.valid[i]]
    assert bad == ["07.jpg", "07.jpg"]
    assert loader.bad_rows == 2
    assert [record.getMessage() for record in caplog.records].count(
        "epoch 0: rows that do not decode are masked: 07.jpg"
    ) == 1


def test_too_many_undecodable_rows_fail_the_run_and_name_them(tmp_path, monkeypatch):
    opened = bad_rows_dataset(tmp_path, monkeypatch)
    before = set(threading.enumerate())
    with pytest.raises(DataError, match=r"data\.max_bad_share=0\.01.*07\.jpg"):
        take(make_loader(opened, make_plan(opened)), 4)
    assert set(threading.enumerate()) == before


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data is not beside this checkout")
def test_real_images_with_boxes(tmp_path):
    coco = SHARED_DATA / "coco"
    source = CocoSourceConfig(
        inputs=(str(coco / "val2017"),), annotations=str(coco / "annotations" / "instances_val2017.json")
    )
    manifest = build_dataset(BuildConfig(source=source, output=str(tmp_path), short_side=64))
    assert manifest.num_images == 128
    opened = open_dataset(str(tmp_path))
    loader = EvalLoader(opened, DataConfig(uri=str(tmp_path), decode_size=96), batch_size=32)
    batch = next(iter(loader))
    assert batch.valid.all()
    known = read_annotations(opened)
    for row, image_id in enumerate(batch.image_ids):
        annotations = known[image_id]
        assert annotations.size_hw == tuple(batch.source_hw[row].tolist())
        boxes = annotations.boxes_xyxy
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert (boxes <= np.array(annotations.size_hw * 2)[[1, 0, 1, 0]] + 1).all()


def test_decoding_is_on_the_cpu_and_an_older_experiment_that_says_so_loads():
    assert build(DataConfig, {"uri": "x", "decode_device": "cpu"}) == DataConfig(uri="x")
    with pytest.raises(
        ConfigError, match=r"data\.decode_device: is 'cuda', but images are decoded on CPU threads; remove"
    ):
        build(DataConfig, {"uri": "x", "decode_device": "cuda"})
