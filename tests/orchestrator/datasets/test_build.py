"""A build is the same however it is run, and nothing that is wrong with an image stops it or is lost."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.datasets import shard_tasks
from orchestrator.datasets.build import build_dataset, build_parts
from tests.places import ROOT
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
from workloads.data.store.manifest import Manifest, open_dataset
from workloads.errors import ConfigError, DataError


def folder_build(source: Path, output: Path, **options) -> BuildConfig:
    return BuildConfig(source=FolderSourceConfig(inputs=(str(source),)), output=str(output), **options)


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "images", per_class=8)


SMALL = {"rows_per_shard": 10, "row_group_bytes": 6000}


def test_a_rebuild_elsewhere_is_identical(source, tmp_path):
    first = build_dataset(folder_build(source, tmp_path / "a", **SMALL))
    moved = shutil.copytree(source, tmp_path / "moved")
    second = build_dataset(folder_build(moved, tmp_path / "b", **SMALL))
    assert first.sha256 == second.sha256
    assert Manifest.from_json((tmp_path / "a" / "manifest.json").read_text(), name="") == first
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()
    assert len(first.shards) == 4
    assert build_dataset(folder_build(source, tmp_path / "c", seed=1, **SMALL)).sha256 != first.sha256


def test_a_killed_build_shows_no_dataset_and_ends_the_same(source, tmp_path, monkeypatch):
    whole = build_dataset(folder_build(source, tmp_path / "whole", **SMALL))
    run_task = shard_tasks.run_task
    ran = []

    def killed_at_the_third(task, *rest):
        if task.index == 2:
            raise KeyboardInterrupt
        return run_task(task, *rest)

    config = folder_build(source, tmp_path / "killed", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(shard_tasks, "run_task", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(config)
    with pytest.raises(DataError, match=r"manifest\.json.*orchestrator data build"):
        open_dataset(config.output)
    write_shard = shard_tasks.write_shard
    monkeypatch.setattr(
        shard_tasks, "write_shard", lambda *rest, **named: (ran.append(1), write_shard(*rest, **named))[1]
    )
    assert build_dataset(config).sha256 == whole.sha256
    assert len(ran) == 2  # the first two stood
    assert not (tmp_path / "killed" / "_build").exists()


KILLED_BUILD = """
import os, signal, sys
from orchestrator.datasets.build import build_dataset
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.storage import filesystems

at, writes = int(sys.argv[3]), 0
replace = os.replace

def die_at(partial, path):
    global writes
    writes += 1
    if writes == at:
        os.truncate(partial, os.path.getsize(partial) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)

filesystems.os.replace = die_at
source = FolderSourceConfig(inputs=(sys.argv[1],))
build_dataset(BuildConfig(source=source, output=sys.argv[2], rows_per_shard=10, row_group_bytes=6000))
"""


@pytest.mark.parametrize("at", [1, 6, 13])  # the first shard, the note of a finished one, the manifest
def test_sigkill_in_the_middle_of_a_write(source, tmp_path, at):
    (source / "copy.jpg").write_bytes((source / "class_0" / "000.jpg").read_bytes())
    whole = build_dataset(folder_build(source, tmp_path / "whole", **SMALL))
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(output), str(at)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (partial,) = output.rglob("*.partial-*")
    assert partial.name.startswith({1: "shard-", 6: "dataset-", 13: "manifest.json"}[at])
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        open_dataset(str(output))
    assert build_dataset(folder_build(source, output, **SMALL)).sha256 == whole.sha256
    assert sorted(path.name for path in output.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_an_existing_dataset_is_kept_or_replaced_on_request(source, tmp_path):
    config = folder_build(source, tmp_path / "out", **SMALL)
    first = build_dataset(config)
    stamp = (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns
    assert build_dataset(config).sha256 == first.sha256
    assert (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"holds another dataset.*overwrite=true"):
        build_dataset(folder_build(source, tmp_path / "out", seed=5))
    second = build_dataset(folder_build(source, tmp_path / "out", seed=5, overwrite=True))
    assert open_dataset(str(tmp_path / "out")).manifest.sha256 == second.sha256 != first.sha256
    assert sorted(path.name for path in (tmp_path / "out").glob("shard-*")) == ["shard-000000.parquet"]


def test_train_and_val_share_no_id_and_no_content(source, tmp_path):
    for index in range(8):  # copies of images that may fall on the other side
        (source / f"copy_{index}.jpg").write_bytes((source / "class_0" / f"{index:03d}.jpg").read_bytes())
    config = folder_build(source, tmp_path / "out", val_share=0.3)
    manifests = build_parts(config)
    train, val = (read_images(tmp_path / "out" / part) for part in ("train", "val"))
    assert len(train) == manifests["train"].num_images
    assert not train.keys() & val.keys()
    assert not set(train.values()) & set(val.values())
    assert len(train) + len(val) == 32
    assert 3 <= len(val) <= 17
    assert build_parts(config) == manifests


def read_images(folder: Path) -> dict[str, bytes]:
    rows = [row for path in folder.glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["image_id"]: row["image"]["bytes"] for row in rows}


def test_ray_data_on_two_nodes_builds_the_same_dataset_and_reads_it(source, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    here = build_dataset(folder_build(source, tmp_path / "here", **SMALL))
    told = []
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        config = folder_build(source, tmp_path / "ray", **SMALL)
        there = build_dataset(config, on_ray=True, progress=lambda done, total: told.append((done, total)))
        files = sorted(str(path) for path in (tmp_path / "ray").glob("shard-*.parquet"))
        read = ray.data.read_parquet(files).select_columns(["image_id", "image"]).take_all()
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert there.sha256 == here.sha256
    assert told[-1] == (32, 32)
    assert len(told) == 4
    assert {row["image_id"]: row["image"]["bytes"] for row in read} == read_images(tmp_path / "here")


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


def test_statistics_are_those_of_the_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    for index, level in enumerate((0, 255)):
        image = Image.new("RGB", (40 + 100 * index, 40), (level, 51, 0))
        (tmp_path / "images" / f"{index}.png").write_bytes(encoded(image, "PNG"))
    statistics = build_dataset(folder_build(tmp_path / "images", tmp_path / "out")).statistics
    assert statistics["longer_sides"] == {"64": 1, "256": 1}
    assert statistics["channel_mean"][1:] == [0.2, 0.0]
    assert statistics["channel_std"][1:] == [0.0, 0.0]


def test_rows_are_mixed_over_row_groups(tmp_path):
    source = make_folder(tmp_path / "images", classes=4, per_class=40, width=16, height=16)
    build_dataset(folder_build(source, tmp_path / "out", row_group_bytes=20_000))
    file = pq.ParquetFile(tmp_path / "out" / "shard-000000.parquet")
    for group in range(file.num_row_groups - 1):
        labels = Counter(file.read_row_group(group, columns=["label"])["label"].to_pylist())
        total = sum(labels.values())
        entropy = -sum(n / total * math.log2(n / total) for n in labels.values())
        assert entropy > 1.5, labels


def test_row_groups_lie_where_the_index_says(source, tmp_path):
    build_dataset(folder_build(source, tmp_path / "out", **SMALL))
    opened = open_dataset(str(tmp_path / "out"))
    index = opened.row_groups
    for shard in range(len(opened.manifest.shards)):
        groups = range(index.first[shard], index.first[shard + 1])
        file = pq.ParquetFile(opened.shard_path(shard))
        assert file.num_row_groups == len(groups)
        ends = [int(index.offset[g] + index.length[g]) for g in groups]
        assert int(index.offset[groups[0]]) == 4  # after the magic
        assert [int(index.offset[g]) for g in groups[1:]] == ends[:-1]
        assert [file.metadata.row_group(i).num_rows for i in range(len(groups))] == index.rows[list(groups)].tolist()
        assert file.metadata.row_group(0).column(0).compression == "UNCOMPRESSED"


def test_rejects_are_listed_with_reasons(source, tmp_path):
    (source / "empty.jpg").write_bytes(b"")
    (source / "words.jpg").write_bytes(b"these are words")
    (source / "cut.jpg").write_bytes(encoded(picture(5))[:-400])
    (source / "notes.txt").write_text("left out of the listing")
    (source / "huge.png").write_bytes(encoded(picture(6, width=300, height=200), "PNG"))
    (source / "zz_copy.jpg").write_bytes((source / "class_1" / "003.jpg").read_bytes())
    (source / "class_0" / "copy.jpg").write_bytes((source / "class_0" / "000.jpg").read_bytes())
    manifest = build_dataset(folder_build(source, tmp_path / "out", max_pixels=50_000, **SMALL))
    rejects = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    assert {path: reason.split(":")[0] for path, reason in rejects.items()} == {
        "empty.jpg": "empty file",
        "words.jpg": "not an image",
        "cut.jpg": "undecodable",
        "huge.png": "too large",
        "zz_copy.jpg": "duplicate",
        "class_0/copy.jpg": "duplicate",
    }
    assert rejects["cut.jpg"] == "undecodable: Image is incomplete or truncated"
    assert manifest.num_images == 32
    assert manifest.source["listed"] == 38
    assert manifest.source["rejected"] == manifest.rejects.rows == 6
    assert len(read_annotations(open_dataset(str(tmp_path / "out")))) == 32


def test_bytes_are_kept_unless_a_short_side_is_asked_for(source, tmp_path):
    build_dataset(folder_build(source, tmp_path / "kept"))
    for row in pq.read_table(tmp_path / "kept" / "shard-000000.parquet").to_pylist():
        assert row["image"]["bytes"] == (source / row["image"]["path"]).read_bytes()
    build_dataset(folder_build(source, tmp_path / "small", short_side=24))
    for row in pq.read_table(tmp_path / "small" / "shard-000000.parquet").to_pylist():
        assert (row["width"], row["height"]) == (32, 24)


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
    with pytest.raises(DataError, match="holds no images"):
        build_dataset(folder_build(tmp_path / "bare", tmp_path / "out"))
    (tmp_path / "bare" / "a.jpg").write_bytes(b"words")
    with pytest.raises(DataError, match="none of the 1 files"):
        build_dataset(folder_build(tmp_path / "bare", tmp_path / "out"))


def remove_shard(root: Path) -> None:
    (root / "shard-000001.parquet").unlink()


def cut_shard(root: Path) -> None:
    data = (root / "shard-000001.parquet").read_bytes()
    (root / "shard-000001.parquet").write_bytes(data[:-10])


def change_index(root: Path) -> None:
    data = bytearray((root / "row_groups.parquet").read_bytes())
    data[20] ^= 1
    (root / "row_groups.parquet").write_bytes(data)


def change_version(root: Path) -> None:
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 0'))


def break_manifest(root: Path) -> None:
    (root / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_shard, r"shard-000001\.parquet: is missing"),
        (cut_shard, r"shard-000001\.parquet: has \d+ bytes"),
        (change_index, r"row_groups\.parquet: does not match"),
        (change_version, "schema version 0"),
        (break_manifest, "not a dataset manifest"),
    ],
)
def test_a_damaged_dataset_is_refused_by_name(source, tmp_path, spoil, message):
    build_dataset(folder_build(source, tmp_path / "out", **SMALL))
    spoil(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / "out"))
