"""Builds that are killed, moved, out of space or damaged: resumed to the same dataset, or refused by name."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.datasets import shard_tasks
from orchestrator.datasets.build import build_dataset, with_absolute_paths
from orchestrator.discovery.spec import load_discovery
from tests.orchestrator.datasets.conftest import SMALL, folder_build, read_images
from tests.places import ROOT
from workloads.config import build
from workloads.data.build.shards import BuildConfig
from workloads.data.store.manifest import open_dataset
from workloads.errors import ConfigError, DataError


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
    counted = lambda *rest, **named: (ran.append(1), write_shard(*rest, **named))[1]  # noqa: E731
    monkeypatch.setattr(shard_tasks, "write_shard", counted)
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


def test_ray_data_on_two_nodes_builds_the_same_dataset_and_reads_it(source, tmp_path, monkeypatch):
    """With relative paths, which the workers, whose folder is another one, would resolve to other places."""
    import ray
    from ray.cluster_utils import Cluster

    here = build_dataset(folder_build(source, tmp_path / "here", **SMALL))
    calls = []
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        monkeypatch.chdir(tmp_path)
        config = folder_build(Path(source.name), Path("ray"), **SMALL)
        there = build_dataset(config, on_ray=True, progress=lambda done, total: calls.append((done, total)))
        files = sorted(str(path) for path in (tmp_path / "ray").glob("shard-*.parquet"))
        read = ray.data.read_parquet(files).select_columns(["image_id", "image"]).take_all()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "shard-000001.parquet").mkdir()  # in the way of a shard
        with pytest.raises(DataError, match=r"full: cannot be written \(.*; check free space") as refused:
            build_dataset(folder_build(source, tmp_path / "full", **SMALL), on_ray=True)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert "\n" not in str(refused.value)
    assert there.sha256 == here.sha256
    assert calls[-1] == (32, 32)
    assert len(calls) == 4
    assert {row["image_id"]: row["image"]["bytes"] for row in read} == read_images(tmp_path / "here")


def test_relative_paths_mean_the_folder_in_which_the_build_was_started(source, tmp_path, monkeypatch):
    whole = build_dataset(folder_build(source, tmp_path / "whole", **SMALL))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    config = folder_build(Path(source.name), Path("out"), **SMALL)
    moved = build_dataset(config, progress=lambda done, total: os.chdir(elsewhere))
    assert moved == whole and not list(elsewhere.iterdir())
    assert read_images(tmp_path / "out") == read_images(tmp_path / "whole")


def test_a_relative_output_in_the_working_directory_of_a_ray_job_is_refused(source, tmp_path, monkeypatch):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="output: shards lies in this job's working directory"):
        build_dataset(folder_build(source, Path("shards")))
    with pytest.raises(ConfigError, match="output: runs/discovery lies in this job's working directory"):
        load_discovery(["uri=shards", "methods=[centre]"])


def test_every_path_of_a_build_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "source": {"kind": "coco", "inputs": ["images"], "annotations": "instances.json"},
        "regions": {"panoptic": {"masks": "panoptic.json"}, "grid": {}},
        "output": "out",
    }
    made = with_absolute_paths(build(BuildConfig, given))
    assert made.source.inputs == (f"{tmp_path}/images",) and made.source.annotations == f"{tmp_path}/instances.json"
    assert made.regions.panoptic.masks == f"{tmp_path}/panoptic.json" and made.output == f"{tmp_path}/out"
    assert with_absolute_paths(folder_build("s3://bucket/a", "s3://bucket/b")).output == "s3://bucket/b"


@pytest.mark.parametrize("room", [0, 500, 4000, 12_000])  # bytes that a file may have
def test_a_full_disk_ends_the_build_in_one_sentence(source, tmp_path, room):
    whole = build_dataset(folder_build(source, tmp_path / "whole", **SMALL))
    config = folder_build(source, tmp_path / "out", **SMALL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(DataError, match=r"out: cannot be written .*File too large.*check free space") as caught:
            build_dataset(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert build_dataset(config) == whole


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
