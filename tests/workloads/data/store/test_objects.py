"""Whose objects count: boxes from elsewhere, one category for all, fractions that hold each other, plans over some rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.loading.subset_plan import SubsetPlan
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import (
    AGNOSTIC,
    BOXES_SCHEMA,
    category_names,
    read_boxes,
    read_objects,
    read_panoptic,
    segment_ids,
    select_images,
)
from workloads.errors import ConfigError, DataError


def write_boxes(path, rows):
    names = BOXES_SCHEMA.names
    pq.write_table(
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=BOXES_SCHEMA), path
    )
    return str(path)


def test_boxes_from_elsewhere_take_the_place_of_the_datasets_own(coco, tmp_path):
    dataset = open_dataset(coco["train"])
    rows = [
        ("1", 2.0, 3.0, 30.0, 40.0, 0.9, "found"),
        ("1", -5.0, 0.0, 10.0, 10.0, 0.5, "found"),
        ("2", 70.0, 70.0, 70.0, 75.0, 0.5, "found"),  # without area
        ("elsewhere", 0.0, 0.0, 1.0, 1.0, 0.5, "found"),
    ]
    objects = read_objects(dataset, boxes=write_boxes(tmp_path / "boxes.parquet", rows))
    assert objects["1"].boxes_xyxy.tolist() == [[2, 3, 30, 40], [0, 0, 10, 10]]
    assert objects["1"].categories == ("found", "found") and not objects["1"].crowd.any()
    assert sum(len(item.boxes_xyxy) for item in objects.values()) == 2
    assert list(objects) == list(read_objects(dataset))
    assert category_names(dataset, objects, class_agnostic=False) == ("found",)
    assert select_images(objects, fraction=1.0, seed=0).sum() == 1
    assert select_images(objects, fraction=1.0, seed=0, keep_empty=True).sum() == 16


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [([("no such image", 0.0, 0.0, 1.0, 1.0, 1.0, "a")], "has none of the images"), ([], "has none of the images")],
)
def test_boxes_of_another_dataset_are_refused(coco, tmp_path, rows, sentence):
    with pytest.raises(DataError, match=sentence):
        read_objects(open_dataset(coco["train"]), boxes=write_boxes(tmp_path / "boxes.parquet", rows))


def test_files_that_hold_no_boxes_are_refused(coco, tmp_path):
    pq.write_table(pa.table({"image_id": ["1"], "x0": [0.0]}), tmp_path / "other.parquet")
    for uri in (str(tmp_path / "other.parquet"), str(tmp_path / "missing.parquet")):
        with pytest.raises(DataError, match="boxes: "):
            read_boxes(uri)
    nan = write_boxes(tmp_path / "nan.parquet", [("1", float("nan"), 0.0, 1.0, 1.0, 1.0, "a")])
    with pytest.raises(DataError, match="NaN or infinite"):
        read_boxes(nan)
    with pytest.raises(DataError, match="masks: "):
        read_panoptic(str(tmp_path / "missing.json"))
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(DataError, match="not in COCO's panoptic format"):
        read_panoptic(str(tmp_path / "odd.json"))


def test_class_agnostic_objects_are_of_one_category(coco):
    dataset = open_dataset(coco["train"])
    objects = read_objects(dataset, class_agnostic=True)
    assert {name for item in objects.values() for name in item.categories} == {AGNOSTIC}
    assert category_names(dataset, objects, class_agnostic=True) == (AGNOSTIC,)
    assert category_names(dataset, read_objects(dataset), class_agnostic=False) == ("bar", "square")


def test_segment_ids_are_little_endian_in_colours_and_values_in_grey():
    import io

    from PIL import Image

    def png(pixels, mode=None):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    colours = np.array([[[5, 1, 0], [255, 255, 255]]], dtype=np.uint8)
    assert segment_ids(png(colours)).tolist() == [[261, 2**24 - 1]]
    assert segment_ids(png(np.array([[7, 40_000]], dtype=np.uint16))).tolist() == [[7, 40_000]]


def test_fractions_hold_each_other_and_take_only_images_with_objects(coco):
    objects = read_objects(open_dataset(coco["train"]))
    with_objects = np.array([bool(len(item.boxes_xyxy)) for item in objects.values()])
    before = np.zeros(len(objects), dtype=bool)
    for fraction, count in ((0.01, 1), (0.1, 1), (0.25, 3), (0.5, 6), (1.0, 12)):
        chosen = select_images(objects, fraction=fraction, seed=0)
        assert chosen.sum() == count and (chosen >= before).all() and (with_objects >= chosen).all()
        before = chosen
    others = [select_images(objects, fraction=0.5, seed=seed).tolist() for seed in range(4)]
    assert len({tuple(chosen) for chosen in others}) > 1


def test_a_plan_over_some_rows_takes_each_once_an_epoch_on_any_number_of_ranks():
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 9, size=40)
    selected = rng.random(rows.sum()) < 0.3
    selected[: rows[0]] = False  # a row group of which nothing is taken
    plan = SubsetPlan(rows, selected, dataset_sha256="d", seed=1, global_batch_size=8)
    starts = np.cumsum(rows) - rows
    for epoch in range(2):
        for world_size in (1, 3):
            taken = []
            for batch in range(plan.steps_per_epoch):
                for rank in range(world_size):
                    _, group, row = plan.share(epoch, batch, rank, world_size)
                    assert (row < rows[group]).all()
                    assert set(group) <= set(plan.open_groups(epoch, batch, rank, world_size))
                    taken += (starts[group] + row).tolist()
            _, group, row = plan.remainder(epoch)
            taken += (starts[group] + row).tolist()
            assert sorted(taken) == np.flatnonzero(selected).tolist()


def test_a_plan_over_all_rows_is_the_plan_itself():
    rows = np.array([3, 5, 2, 7, 4])
    options = {"dataset_sha256": "d", "seed": 3, "global_batch_size": 4}
    whole, subset = SamplePlan(rows, **options), SubsetPlan(rows, np.ones(21, dtype=bool), **options)
    for batch in range(whole.steps_per_epoch):
        for ours, theirs in zip(subset.share(1, batch, 0, 2), whole.share(1, batch, 0, 2), strict=True):
            assert (ours == theirs).all()


def test_nothing_to_train_on_is_said():
    with pytest.raises(ConfigError, match="no image has an object"):
        SubsetPlan(np.array([4]), np.zeros(4, dtype=bool), dataset_sha256="d", seed=0, global_batch_size=2)
    with pytest.raises(ConfigError, match="has only 3 images"):
        SubsetPlan(np.array([4]), np.arange(4) < 3, dataset_sha256="d", seed=0, global_batch_size=4)
