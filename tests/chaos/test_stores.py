"""Object stores, files, disks and the tracking server that fail."""

import errno
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from orchestrator.storage import object_store
from tests.chaos.conftest import (
    EXPERIMENT,
    STEPS,
    Nodes,
    TrackingServer,
    assert_ledger,
    assert_nothing_left,
    assert_nothing_lost,
    build_images,
    driver_of,
    losses,
    status,
    train_workers,
    wait_step,
    wait_until,
)
from tests.s3_peer import FaultyProxy, S3Peer
from workloads.storage.checkpoint_store import CheckpointStore

Reference = dict[int, dict[int, float]]


@pytest.fixture
def bucket(s3_peer: S3Peer, images: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with the dataset under `train/`; its name."""
    for name, value in s3_peer.environment().items():
        monkeypatch.setenv(name, value)
    name = f"chaos-{uuid.uuid4().hex}"
    client = object_store.client()
    client.create_bucket(Bucket=name)
    for path in sorted(Path(images).iterdir()):
        client.upload_file(str(path), name, f"train/{path.name}")
    return name


def on_s3(bucket: str, tracking: TrackingServer) -> list[str]:
    return [f"data.uri=s3://{bucket}/train", f"storage.path=s3://{bucket}/runs", f"tracking.uri={tracking.uri}"]


@pytest.mark.parametrize("during", ["a read", "a checkpoint's upload"])
def test_7_the_object_store_is_away_for_20_s(
    during: str, nodes: Nodes, bucket: str, s3_peer: S3Peer, faulty: FaultyProxy, tracking: TrackingServer,
    images: str, tmp_path: Path, undisturbed: Reference,
) -> None:  # fmt: skip
    environment = s3_peer.environment(endpoint=faulty.endpoint)
    given = on_s3(bucket, tracking)
    if during == "a read":
        given[1] = f"storage.path={tmp_path}/runs"
    driver = driver_of(tmp_path, images, nodes, *given, **environment).start()
    wait_step(driver, 7)
    faulty.down = True
    time.sleep(20)
    faulty.down = False
    assert driver.wait() == 0, driver.text
    assert faulty.faults > 0
    assert_nothing_lost(tmp_path, images, undisturbed[2], uri=tracking.uri)
    assert_nothing_left(nodes)


def test_8_the_object_store_answers_503_in_bursts_and_late(
    nodes: Nodes, bucket: str, s3_peer: S3Peer, faulty: FaultyProxy, tracking: TrackingServer,
    images: str, tmp_path: Path, undisturbed: Reference,
) -> None:  # fmt: skip
    environment = s3_peer.environment(endpoint=faulty.endpoint)
    driver = driver_of(tmp_path, images, nodes, *on_s3(bucket, tracking), **environment).start()
    for step in (2, 8, 14):
        wait_step(driver, step)
        faulty.refuse, faulty.delay_s = 5, 0.3
    assert driver.wait() == 0, driver.text
    assert faulty.faults > 0
    assert_nothing_lost(tmp_path, images, undisturbed[2], uri=tracking.uri)
    assert_nothing_left(nodes)


@pytest.mark.short
def test_9_the_tracking_server_dies_and_comes_back(
    nodes: Nodes, tracking: TrackingServer, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes, f"tracking.uri={tracking.uri}").start()
    wait_step(driver, 4)
    tracking.kill()
    wait_step(driver, 16)  # training does not wait for it
    tracking.start()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2], uri=tracking.uri)
    assert_nothing_left(nodes)


def test_9_the_tracking_server_stays_away_and_so_does_the_driver(
    nodes: Nodes, tracking: TrackingServer, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    """The process dies with undelivered records; the same command delivers them once the server is there."""
    driver = driver_of(tmp_path, images, nodes, f"tracking.uri={tracking.uri}").start()
    wait_step(driver, 4)
    tracking.kill()
    wait_step(driver, 10)
    driver.kill()
    tracking.start()
    assert driver.start().wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2], uri=tracking.uri)
    assert_nothing_left(nodes)


def test_9_two_drivers_start_at_once_on_s3_and_one_trains(
    nodes: Nodes, bucket: str, s3_peer: S3Peer, tracking: TrackingServer, images: str, tmp_path: Path,
    undisturbed: Reference,
) -> None:  # fmt: skip
    given, environment = on_s3(bucket, tracking), s3_peer.environment()
    drivers = [driver_of(folder_of(tmp_path, n), images, nodes, *given, **environment).start() for n in "ab"]
    codes = [driver.wait() for driver in drivers]
    assert sorted(codes) == [0, 2], [driver.text for driver in drivers]
    trained, refused = (drivers[codes.index(code)] for code in (0, 2))
    assert "another process is training run 'hurt' (process " in refused.text
    assert_nothing_lost(trained.folder, images, undisturbed[2], uri=tracking.uri)
    assert_nothing_left(nodes)


def test_9_a_driver_that_is_cut_off_longer_than_its_lease_gives_way_to_another(
    nodes: Nodes, bucket: str, s3_peer: S3Peer, faulty: FaultyProxy, tracking: TrackingServer, images: str,
    tmp_path: Path, undisturbed: Reference,
) -> None:  # fmt: skip
    # The ledger's folder is part of the run's config, and each driver has its own.
    given = [*on_s3(bucket, tracking), "failure.patience_s=600", "ledger=null"]
    cut_off = s3_peer.environment(endpoint=faulty.endpoint)
    first = driver_of(folder_of(tmp_path, "a"), images, nodes, *given, **cut_off).start()
    wait_step(first, 9)
    faulty.down = True
    second = driver_of(folder_of(tmp_path, "b"), images, nodes, *given, **s3_peer.environment()).start()
    claims = f"s3://{bucket}/runs/hurt/_lock"
    wait_until(lambda: "00000002" in object_store.list_names(claims), "the takeover", second, timeout_s=240)
    faulty.down = False
    assert first.wait() == 1, first.text
    assert "another process took over from this one" in first.text
    assert second.wait() == 0, second.text
    history = losses(second.folder, tracking.uri)
    assert [step for step, _ in history] == list(range(1, STEPS + 1))
    assert all(loss == pytest.approx(undisturbed[2][step], rel=1e-4) for step, loss in history)
    assert status(second.folder, tracking.uri)[0] == "FINISHED"
    assert_nothing_left(nodes)


def folder_of(root: Path, name: str) -> Path:
    """The folder of one of several drivers."""
    folder = root / name
    folder.mkdir()
    return folder


@pytest.mark.short
def test_9_a_kill_during_any_write_of_the_runs_record_leaves_it_readable(images: str, tmp_path: Path) -> None:
    """Every call that syncs or renames a file of the run's identity, journal and archive is a point to die at."""
    experiment = tmp_path / "chaos.yaml"
    places = f"storage: {{path: {tmp_path}/runs}}\ndata: {{uri: {images}, "
    experiment.write_text(EXPERIMENT.replace("data: {", places))
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.killed_writes", str(experiment), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["truncated", "a flipped byte"])
def test_10_a_damaged_shard_ends_the_run_in_one_sentence(
    damage: str, nodes: Nodes, images: str, tmp_path: Path
) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(images, broken)
    shard = broken / "shard-000001.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        data = data[:-1000]
    else:
        data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    driver = driver_of(tmp_path, images, nodes, f"data.uri={broken}").start()
    assert driver.wait() in (1, 2), driver.text
    errors = [line for line in driver.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "shard-000001.parquet" in errors[0] and "restore it" in errors[0], driver.text
    assert "continuing" not in driver.text
    assert_nothing_left(nodes)


def test_10_undecodable_rows_are_masked_counted_and_listed(nodes: Nodes, images: str, tmp_path: Path) -> None:
    uri = build_images(tmp_path / "spoilt", broken=(3, 11))
    driver = driver_of(tmp_path, uri, nodes, "data.max_bad_share=0.5").start()
    wait_step(driver, 6)
    train_workers()[0].kill()
    assert driver.wait() == 0, driver.text
    assert status(tmp_path)[1]["train/bad_rows"] > 0
    assert_ledger(tmp_path, uri, frozenset({"003.png", "011.png"}))
    assert_nothing_left(nodes)


def test_11_the_newest_checkpoint_is_cut_short(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes).start()
    wait_step(driver, 14)
    driver.kill()
    store = CheckpointStore(LocalFileSystem(), f"{tmp_path}/runs/hurt/checkpoints")
    newest = Path(store.path_of(store.steps()[-1])) / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert driver.start().wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert status(tmp_path)[1]["fault/damaged_checkpoints"] == 1
    assert_nothing_left(nodes)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system with room for three checkpoints; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a full disk cannot be made here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_12_the_checkpoint_path_is_full_until_there_is_room(
    nodes: Nodes, images: str, tmp_path: Path, small_disk: Path, undisturbed: Reference
) -> None:
    ballast = small_disk / "ballast"
    driver = driver_of(tmp_path, images, nodes).start()
    (tmp_path / "runs" / "hurt").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "hurt" / "checkpoints").symlink_to(small_disk)
    wait_step(driver, 5)
    fill(ballast)
    wait_step(driver, 14)
    ballast.unlink()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert status(tmp_path)[1]["fault/checkpoint_retries"] > 0
    assert_nothing_left(nodes)


def test_12_a_full_checkpoint_path_ends_the_run_in_words_and_the_command_continues_it(
    nodes: Nodes, images: str, tmp_path: Path, small_disk: Path, undisturbed: Reference
) -> None:
    ballast = small_disk / "ballast"
    (tmp_path / "runs" / "hurt").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "hurt" / "checkpoints").symlink_to(small_disk)
    driver = driver_of(tmp_path, images, nodes, "failure.patience_s=1").start()
    wait_step(driver, 5)
    fill(ballast)
    assert driver.wait() == 1, driver.text
    assert "No space left on device" in driver.text and "same command again" in driver.text
    ballast.unlink()
    assert driver.start().wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


def test_12_a_full_cache_is_done_without(
    nodes: Nodes, images: str, tmp_path: Path, small_disk: Path, undisturbed: Reference
) -> None:
    fill(small_disk / "ballast")
    driver = driver_of(tmp_path, images, nodes, f"data.cache_dir={small_disk}/cache").start()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])


def fill(path: Path) -> None:
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
