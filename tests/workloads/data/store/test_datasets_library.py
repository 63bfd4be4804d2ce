"""Hugging Face's `datasets` opens our shards as images; it runs in an environment of its own."""

import json
import os
import subprocess

import pytest

from tests.s3_peer import peer_environment
from tests.workloads.data.images import encoded, quarters
from workloads.data.store.annotations import read_annotations

SCRIPT = """
import json, sys
from datasets import Image, load_dataset
data = load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
first = data[0]
print(json.dumps({
    "rows": len(data), "is_image": isinstance(data.features["image"], Image), "size": first["image"].size,
    "id": first["image_id"], "label": first["label"], "objects": first["objects"],
    "pixel": list(first["image"].convert("RGB").getpixel((5, 5))),
}))
"""


def load(files: str, cache: str) -> dict:
    python = peer_environment("datasets", "datasets>=4", "Pillow")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": cache}
    command = [str(python), "-c", SCRIPT, files, cache]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_class_folders(dataset, tmp_path):
    found = load(f"{dataset.root}/shard-*.parquet", str(tmp_path))
    assert (found["rows"], found["is_image"], found["size"]) == (48, True, [64, 48])
    assert found["label"] == read_annotations(dataset)[found["id"]].label


def test_objects(tmp_path):
    from orchestrator.datasets.build import build_dataset
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import CocoSourceConfig

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encoded(quarters()))
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4.5], "iscrowd": 1}],
        "categories": [{"id": 2, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    source = CocoSourceConfig(inputs=(str(tmp_path / "in"),), annotations=str(tmp_path / "instances.json"))
    build_dataset(BuildConfig(source=source, output=str(tmp_path / "out")))
    found = load(f"{tmp_path}/out/shard-*.parquet", str(tmp_path / "cache"))
    assert found["objects"] == [{"bbox": [1, 2, 3, 4.5], "category": "cat", "crowd": True, "difficult": False}]
    assert found["pixel"] == pytest.approx([200, 30, 30], abs=12)
