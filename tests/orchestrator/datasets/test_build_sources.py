"""Every kind of source becomes a dataset: folders, COCO, VOC, Caltech-101 and Parquet."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.datasets.build import build_dataset
from tests.orchestrator.datasets.conftest import SMALL, folder_build, read_images
from tests.workloads.data.images import encoded, make_folder, picture
from workloads.config import build
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import (
    CaltechSourceConfig,
    CocoSourceConfig,
    FolderSourceConfig,
    ParquetSourceConfig,
    VocSourceConfig,
)
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset
from workloads.errors import ConfigError, DataError


def test_voc(tmp_path):
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    xml = "<annotation>{}</annotation>"
    item = (
        "<object><name>dog</name><difficult>{}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>"
    )
    for index, text in enumerate([item.format(0) + item.format(1), ""]):
        (root / "JPEGImages" / f"00000{index}.jpg").write_bytes(encoded(picture(index)))
        (root / "Annotations" / f"00000{index}.xml").write_text(xml.format(text))
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("000000\n000001\n")
    build_dataset(BuildConfig(source=VocSourceConfig(inputs=(str(root),)), output=str(tmp_path / "out")))
    found = read_annotations(open_dataset(str(tmp_path / "out")))
    assert found["000000"].boxes_xyxy.tolist() == [[0, 10, 20, 40]] * 2
    assert found["000000"].difficult.tolist() == [False, True]
    assert found["000001"].categories == ()
    with pytest.raises(DataError, match=r"ImageSets/Main/val\.txt"):
        source = VocSourceConfig(inputs=(str(root),), image_set="val")
        build_dataset(BuildConfig(source=source, output=str(tmp_path / "out")))


def test_caltech101(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    images, annotations = tmp_path / "101_ObjectCategories", tmp_path / "Annotations"
    for number, (label, folder) in enumerate([("ant", "ant"), ("Faces", "Faces_2"), ("BACKGROUND_Google", "")]):
        (images / label).mkdir(parents=True)
        (images / label / "image_0001.jpg").write_bytes(encoded(picture(number)))
        if folder:
            (annotations / folder).mkdir(parents=True)
            savemat(annotations / folder / "annotation_0001.mat", {"box_coord": [[3, 30, 11, 50]]})
    source = CaltechSourceConfig(inputs=(str(images),), annotations=str(annotations))
    manifest = build_dataset(BuildConfig(source=source, output=str(tmp_path / "out")))
    found = read_annotations(open_dataset(str(tmp_path / "out")))
    assert found["Faces/image_0001.jpg"].boxes_xyxy.tolist() == [[10, 2, 50, 30]]
    assert found["ant/image_0001.jpg"].categories == ("ant",)
    assert found["BACKGROUND_Google/image_0001.jpg"].boxes_xyxy.shape == (0, 4)
    assert manifest.source["classes"] == 2


@pytest.mark.parametrize("form", ["struct", "binary"])
def test_existing_parquet(tmp_path, form):
    data = [encoded(picture(index)) for index in range(9)] + [None]
    images = data if form == "binary" else [value and {"bytes": value, "path": None} for value in data]
    table = pa.table({"picture": images, "name": [f"n{i}" for i in range(9)] + ["n0"], "label": list(range(10))})
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 6), tmp_path / "in" / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(6), tmp_path / "in" / "b.parquet", row_group_size=2)
    source = ParquetSourceConfig(inputs=(str(tmp_path / "in"),), image_column="picture", id_column="name")
    manifest = build_dataset(BuildConfig(source=source, output=str(tmp_path / "out")))
    assert read_images(tmp_path / "out") == {f"n{i}": data[i] for i in range(9)}
    assert read_annotations(open_dataset(str(tmp_path / "out")))["n4"].label == "4"
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert rejects == [{"path": "b.parquet#3", "image_id": "n0", "reason": "image id repeated"}]
    assert manifest.num_images == 9
    with pytest.raises(DataError, match="no column 'image'"):
        bad = ParquetSourceConfig(inputs=(str(tmp_path / "in"),))
        build_dataset(BuildConfig(source=bad, output=str(tmp_path / "other")))


def test_our_own_shards_are_a_source_too(source, tmp_path):
    build_dataset(folder_build(source, tmp_path / "first", **SMALL))
    again = ParquetSourceConfig(inputs=(str(tmp_path / "first"),))
    build_dataset(BuildConfig(source=again, output=str(tmp_path / "second"), seed=9))
    assert read_images(tmp_path / "first") == read_images(tmp_path / "second")


def test_coco_objects_scale_with_their_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encoded(picture(0, width=80, height=40)))
    (tmp_path / "images" / "b.jpg").write_bytes(encoded(picture(1, width=80, height=40)))
    annotations = {
        "images": [
            {"id": 7, "file_name": "a.jpg"},
            {"id": 9, "file_name": "b.jpg"},
            {"id": 8, "file_name": "gone.jpg"},
        ],
        "annotations": [{"image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 16], "iscrowd": 1}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    source = CocoSourceConfig(inputs=(str(tmp_path / "images"),), annotations=str(tmp_path / "instances.json"))
    manifest = build_dataset(BuildConfig(source=source, output=str(tmp_path / "out"), short_side=20))
    found = read_annotations(open_dataset(str(tmp_path / "out")))
    assert found["7"].boxes_xyxy.tolist() == [[5, 10, 20, 18]]
    assert found["7"].categories == ("cat",)
    assert found["7"].crowd.tolist() == [True]
    assert found["9"].boxes_xyxy.shape == (0, 4)
    assert manifest.source["categories"] == {"cat": 3}
    assert (manifest.source["listed"], manifest.source["rejected"]) == (3, 1)


def test_several_folders_become_one_dataset(tmp_path):
    one, two = make_folder(tmp_path / "one", per_class=2), tmp_path / "two"
    two.mkdir()
    (two / "x.jpg").write_bytes(encoded(picture(99)))
    source = FolderSourceConfig(inputs=(str(one), str(two)))
    build_dataset(BuildConfig(source=source, output=str(tmp_path / "out")))
    found = read_annotations(open_dataset(str(tmp_path / "out")))
    assert found["one/class_3/001.jpg"].label == "class_3"
    assert found["two/x.jpg"].label is None
    assert len(found) == 9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": {"kind": "folder", "inputs": ["x"]}}, "output"),
        ({"source": {"kind": "folders", "inputs": ["x"]}, "output": "y"}, "source"),
        ({"source": {"kind": "folder", "inputs": ["x"]}, "output": "y", "quality": 0}, "quality"),
        ({"source": {"kind": "folder", "input": ["x"]}, "output": "y"}, "did you mean source.inputs"),
    ],
)
def test_requests_that_cannot_work(data, message):
    with pytest.raises(ConfigError, match=message):
        build(BuildConfig, data)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        build_dataset(folder_build(tmp_path / "gone", tmp_path / "out"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="has no images"):
        build_dataset(folder_build(tmp_path / "bare", tmp_path / "out"))
    (tmp_path / "bare" / "a.jpg").write_bytes(b"words")
    with pytest.raises(DataError, match="none of the 1 files"):
        build_dataset(folder_build(tmp_path / "bare", tmp_path / "out"))
