"""Datasets on a real S3 service, and on one that fails."""

import json
import os
import time
from pathlib import Path

import pytest

from orchestrator.datasets.build import build_dataset
from orchestrator.datasets.verify import verify_dataset
from orchestrator.storage import object_store
from tests.orchestrator.storage.conftest import use
from tests.s3_peer import FaultyProxy, S3Peer
from tests.workloads.data.images import make_folder
from tests.workloads.data.loading.test_loaders import make_loader, make_plan, take
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.store.manifest import open_dataset
from workloads.errors import DataError
from workloads.storage import filesystems
from workloads.storage.filesystems import resolve_uri

boto3 = pytest.importorskip("boto3")


def build_to(output: str, folder: Path) -> BuildConfig:
    source = FolderSourceConfig(inputs=(str(folder),))
    return BuildConfig(source=source, output=output, rows_per_shard=24, row_group_bytes=8000)


@pytest.fixture(scope="module")
def built(s3_peer: S3Peer, folder: Path) -> str:
    """Built once; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, s3_peer.environment())
        object_store.client().create_bucket(Bucket="dataset")
        build_dataset(build_to("s3://dataset/data", folder))
    return "s3://dataset/data"


@pytest.fixture
def uri(peer: S3Peer, built: str) -> str:
    return built


@pytest.fixture
def own_uri(uri: str, bucket: str) -> str:
    """A copy that the test may spoil."""
    s3 = object_store.client()
    for item in s3.list_objects_v2(Bucket="dataset")["Contents"]:
        body = object_store.get_object(f"s3://dataset/{item['Key']}") or b""
        s3.put_object(Bucket=bucket, Key=item["Key"], Body=body)
    return f"s3://{bucket}/data"


def test_a_build_on_s3_is_the_local_one_and_reads_the_same(uri, dataset):
    opened = open_dataset(uri)
    assert opened.manifest.sha256 == dataset.manifest.sha256
    plan = make_plan(opened, 12)
    there, here = (take(make_loader(where, plan), plan.steps_per_epoch) for where in (opened, dataset))
    for one, other in zip(there, here, strict=True):
        assert one.image_ids == other.image_ids
        assert bool((one.images == other.images).all())
    assert verify_dataset(uri).decoded == 48
    listed = object_store.client().list_objects_v2(Bucket="dataset")["Contents"]
    # pyarrow leaves empty objects that stand for folders.
    assert sorted(item["Key"] for item in listed if not item["Key"].endswith("/")) == [
        f"data/{name}"
        for name in (
            "manifest.json",
            "rejects.parquet",
            "row_groups.parquet",
            "shard-000000.parquet",
            "shard-000001.parquet",
        )
    ]


def test_ray_builds_on_s3_what_one_process_does(bucket, dataset, folder):
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        manifest = build_dataset(build_to(f"s3://{bucket}/ray", folder), on_ray=True)
    finally:
        ray.shutdown()
    assert manifest.sha256 == dataset.manifest.sha256
    assert verify_dataset(f"s3://{bucket}/ray").decoded == 48


def test_images_on_s3_are_a_source(bucket, tmp_path):
    folder = make_folder(tmp_path / "images", classes=2, per_class=3)
    s3 = object_store.client()
    for path in folder.rglob("*.jpg"):
        s3.put_object(Bucket=bucket, Key=f"in/{path.relative_to(folder)}", Body=path.read_bytes())
    local = build_dataset(build_to(str(tmp_path / "local"), folder))
    remote = BuildConfig(
        source=FolderSourceConfig(inputs=(f"s3://{bucket}/in",)),
        output=f"s3://{bucket}/out",
        rows_per_shard=24,
        row_group_bytes=8000,
    )
    assert build_dataset(remote).sha256 == local.sha256


@pytest.mark.parametrize(
    ("secret", "where", "message"),
    [
        ("wrong", "s3://{bucket}/data", "credentials"),
        (None, "s3://no-such-bucket-here/data", "bucket does not exist"),
        (None, "s3://{bucket}/elsewhere", r"holds no manifest\.json"),
        (None, "s3://", "names no bucket"),
    ],
)
def test_what_no_repetition_mends_fails_at_once(peer, uri, monkeypatch, secret, where, message):
    if secret:
        use(monkeypatch, peer.environment(secret=secret))
    started = time.monotonic()
    with pytest.raises(DataError, match=message):
        open_dataset(where.format(bucket=uri.split("/")[2]))
    assert time.monotonic() - started < 5


def test_a_service_that_is_not_there_is_said_so_soon(peer, monkeypatch):
    use(monkeypatch, peer.environment(endpoint="http://127.0.0.1:9"))
    started = time.monotonic()
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL"):
        open_dataset("s3://bucket/data")
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL"):
        object_store.preflight("s3://bucket/data")
    assert time.monotonic() - started < 20


def test_a_truncated_shard_is_found_when_the_dataset_is_opened(own_uri):
    bucket, key = object_store.split_s3(f"{own_uri}/shard-000001.parquet")
    body = object_store.get_object(f"{own_uri}/shard-000001.parquet")
    object_store.client().put_object(Bucket=bucket, Key=key, Body=body[:-100])
    with pytest.raises(DataError, match=r"shard-000001\.parquet: has \d+ bytes"):
        open_dataset(own_uri)


def test_a_shard_cut_while_it_is_read_is_an_error_with_its_name(own_uri):
    opened = open_dataset(own_uri)
    bucket, key = object_store.split_s3(f"{own_uri}/shard-000001.parquet")
    body = object_store.get_object(f"{own_uri}/shard-000001.parquet")
    object_store.client().put_object(Bucket=bucket, Key=key, Body=body[: len(body) // 2])
    with pytest.raises(DataError, match=r"shard-000001\.parquet.*bytes, the manifest says"):
        take(make_loader(opened, make_plan(opened, 12)), 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_FIRST_WAIT_S", 0.02)


@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
def test_a_service_that_falters_costs_time_only(peer, uri, dataset, faulty: FaultyProxy, monkeypatch, quick, fault):
    use(monkeypatch, peer.environment(endpoint=faulty.endpoint))
    opened = open_dataset(uri)
    plan = make_plan(opened, 12)
    match fault:
        case "503":
            faulty.refuse = 6
        case "cut":
            faulty.cut = 3
        case "slow":
            faulty.delay_s = 2.0
    loader = make_loader(opened, plan)
    there = take(loader, plan.steps_per_epoch)
    here = take(make_loader(dataset, plan), plan.steps_per_epoch)
    assert [batch.image_ids for batch in there] == [batch.image_ids for batch in here]
    assert all(bool((one.images == other.images).all()) for one, other in zip(there, here, strict=True))
    assert loader.bad_rows == 0
    assert faulty.faults == {"503": 6, "cut": 3, "slow": 0}[fault]


def test_an_outage_that_lasts_ends_the_run_in_words(peer, uri, faulty: FaultyProxy, monkeypatch, quick):
    use(monkeypatch, peer.environment(endpoint=faulty.endpoint))
    opened = open_dataset(uri)
    faulty.refuse = 10**6
    with pytest.raises(DataError, match=r"shard-00000\d\.parquet: cannot be read \(.*503"):
        take(make_loader(opened, make_plan(opened, 12)), 4)


def test_fsspec_users_get_pyarrows_s3(uri):
    pandas = pytest.importorskip("pandas")
    import fsspec

    resolve_uri(uri)
    assert len(pandas.read_parquet(f"{uri}/shard-000000.parquet")) == 24
    with fsspec.open(f"{uri}/manifest.json") as file:
        assert json.load(file)["num_images"] == 48
    assert len(fsspec.filesystem("s3").glob(f"{uri}/shard-*.parquet")) == 2


def test_of_two_writers_one_wins(bucket):
    target = f"s3://{bucket}/manifest.json"
    assert object_store.put_if_absent(target, b"first")
    assert not object_store.put_if_absent(target, b"second")
    assert object_store.get_object(target) == b"first"
    assert object_store.get_object(f"s3://{bucket}/nothing") is None


def test_uploads_that_nobody_finished_are_aborted(bucket):
    s3 = object_store.client()
    s3.create_multipart_upload(Bucket=bucket, Key="data/shard")
    s3.create_multipart_upload(Bucket=bucket, Key="other/shard")
    assert object_store.abort_stale_uploads(f"s3://{bucket}/data") == 0  # not old yet
    assert object_store.abort_stale_uploads(f"s3://{bucket}/data", older_than_s=-5) == 1
    assert len(s3.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1


@pytest.mark.parametrize(
    ("change", "uri_of", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://{}/x", "AWS_SECRET_ACCESS_KEY"),
        ({}, "s3://missing-bucket-here/x", "bucket does not exist"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "s3://{}/x", "no credentials"),
        ({}, "/local/path", "not an S3 URI"),
    ],
)
def test_preflight_says_what_to_mend(bucket, monkeypatch, tmp_path, change, uri_of, message):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    object_store_uri = uri_of.format(bucket)
    with pytest.raises(DataError, match=message):
        object_store.preflight(object_store_uri)
    assert os.environ["AWS_REGION"] == "us-east-1"


def test_a_discovery_keeps_its_parts_and_boxes_in_the_store(bucket: str, built: str, tmp_path: Path) -> None:
    from workloads.config import build
    from workloads.discovery.pseudo_boxes import read_boxes
    from workloads.loops.discovery.finish import finish
    from workloads.loops.discovery.job import DiscoverConfig, finished_record, prepare
    from workloads.loops.discovery.worker import PartWorker

    settings = build(DiscoverConfig, {"uri": built, "methods": ["centre"], "part_size": 20, "gallery": 0})
    output = f"s3://{bucket}/found"
    job = prepare(settings, output)
    worker = PartWorker(job)
    worker.run(1)
    again = prepare(settings, output)  # another process goes on
    assert job.num_parts == 3 and again.missing() == [0, 2]
    for part in again.missing():
        worker.run(part)
    finish(again, tmp_path)
    assert len(set(read_boxes(f"{output}/centre/boxes.parquet").image_ids)) == 48
    assert finished_record(output) is not None
