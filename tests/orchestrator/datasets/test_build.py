"""A build is the same however it is run, and no bad image stops it or is lost."""

import math
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.datasets.build import build_dataset, build_parts
from tests.orchestrator.datasets.conftest import SMALL, folder_build, read_images
from tests.workloads.data.images import encoded, make_folder, picture
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import Manifest, open_dataset
from workloads.errors import DataError


def test_a_rebuild_elsewhere_is_identical(source, tmp_path):
    first = build_dataset(folder_build(source, tmp_path / "a", **SMALL))
    moved = shutil.copytree(source, tmp_path / "moved")
    second = build_dataset(folder_build(moved, tmp_path / "b", **SMALL))
    assert first.sha256 == second.sha256
    assert Manifest.from_json((tmp_path / "a" / "manifest.json").read_text(), name="") == first
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()
    assert len(first.shards) == 4
    assert build_dataset(folder_build(source, tmp_path / "c", seed=1, **SMALL)).sha256 != first.sha256


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
    assert rejects["cut.jpg"].startswith("undecodable: image file is truncated")
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
