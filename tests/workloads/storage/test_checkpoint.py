"""Checkpoints: whole or absent, checked, the right ones kept, and written again when the store fails."""

import dataclasses
import errno
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from torch import nn

from workloads.errors import ConfigError
from workloads.storage.checkpoint import CheckpointError, CheckpointMeta, Snapshot, read_checkpoint, take_snapshot
from workloads.storage.checkpoint_store import CheckpointStore
from workloads.storage.checkpoint_writer import CheckpointWriter
from workloads.storage.space import checkpoint_bytes, num_bytes


def snapshot_of(step: int, **metrics: float) -> Snapshot:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(8, 4)).sum().backward()
    optimizer.step()
    meta = CheckpointMeta(step=step, config_sha256="c", manifest_sha256="m", metrics=metrics)
    window = {"train/loss": torch.tensor(float(step)), "steps": torch.tensor(2)}
    return take_snapshot(model=model, optimizer=optimizer, window=window, config_yaml="name: x\n", meta=meta)


def store_at(folder: Path, **options) -> CheckpointStore:
    return CheckpointStore(LocalFileSystem(), str(folder), **options)


def test_what_is_written_is_read_again(tmp_path):
    snapshot = snapshot_of(7)
    store_at(tmp_path).write(snapshot)
    found = store_at(tmp_path).read_newest()
    assert found.meta.step == 7 and found.meta.state_bytes > 0 and found.passed_over == ()
    for name, value in snapshot.state["model"].items():
        assert torch.equal(found.state["model"][name], value)
    moments = found.state["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, snapshot.state["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(found.state["torch_rng"], snapshot.state["torch_rng"])
    assert float(found.state["window"]["train/loss"]) == 7


def test_a_snapshot_does_not_follow_the_model():
    model = nn.Linear(2, 2)
    meta = CheckpointMeta(step=1, config_sha256="", manifest_sha256="")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    snapshot = take_snapshot(model=model, optimizer=optimizer, window={}, config_yaml="", meta=meta)
    before = snapshot.state["model"]["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(snapshot.state["model"]["weight"], before)


def test_the_newest_few_and_the_best_stay(tmp_path):
    store = store_at(tmp_path, keep=2, best_metric="eval/sga")
    for step, sga in ((1, 0.2), (2, 0.5), (3, 0.4), (4, None), (5, 0.5)):
        store.write(snapshot_of(step, **({"eval/sga": sga} if sga is not None else {})))
    assert store.steps() == [4, 5]
    assert store.best() == (2, f"{store.folder}/best/step_00000002")  # of equals the earlier
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["step_00000002"]
    assert not (tmp_path / "step_00000001").exists()


def flip_first_byte(folder: Path) -> None:
    data = bytearray((folder / "state.pt").read_bytes())
    data[0] ^= 1
    (folder / "state.pt").write_bytes(data)


DAMAGES = {
    "cut short": lambda folder: (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-100]),
    "a flipped byte": flip_first_byte,
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "half a meta.json": lambda folder: (folder / "meta.json").write_text('{"step": 2,'),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_newest_one_is_passed_over_and_said(damage, tmp_path, caplog):
    store = store_at(tmp_path)
    store.write(snapshot_of(1))
    store.write(snapshot_of(2))
    DAMAGES[damage](tmp_path / "step_00000002")
    found = store.read_newest()
    assert found.meta.step == 1 and len(found.passed_over) == 1
    assert "falling back" in caplog.text and "step_00000002" in caplog.text
    DAMAGES[damage](tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        store.read_newest()


def test_one_that_was_not_finished_is_not_there(tmp_path):
    store = store_at(tmp_path)
    store.write(snapshot_of(1))
    store.write(snapshot_of(2))
    (tmp_path / "step_00000002" / "meta.json").unlink()
    assert store.steps() == [1] and store.read_newest().passed_over == ()


def test_only_tensors_and_plain_values_are_unpickled(tmp_path):
    """A checkpoint whose hash is right, but which would run code when it is unpickled."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    snapshot = dataclasses.replace(snapshot_of(1), state={"model": {}, "evil": Evil()})
    store = store_at(tmp_path / "store")
    store.write(snapshot)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        read_checkpoint(store.path_of(1))
    assert not ran.exists()


class Flaky:
    """A store that fails as it is told, and notes what it was given."""

    def __init__(self, store: CheckpointStore, failures: list[Exception]) -> None:
        self.store, self.failures = store, failures
        self.asked: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.folder, self.steps, self.free_bytes = store.folder, store.steps, store.free_bytes

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        self.asked.append(snapshot.meta.step)
        self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        return self.store.write(snapshot)


def test_a_store_that_fails_in_passing_is_asked_again(tmp_path):
    flaky = Flaky(store_at(tmp_path), [OSError("HTTP status 503"), OSError("Connection reset")])
    writer = CheckpointWriter(flaky, first_wait_s=0.01)
    writer.submit(snapshot_of(1))
    writer.flush()
    assert flaky.asked == [1, 1, 1] and writer.retries == 2 and writer.newest.step == 1
    writer.close()


def test_what_is_written_is_not_kept_in_memory(tmp_path):
    writer = CheckpointWriter(store_at(tmp_path))
    snapshot = snapshot_of(1)
    tensor = weakref.ref(snapshot.state["torch_rng"])
    writer.submit(snapshot)
    del snapshot
    writer.flush()
    assert tensor() is None
    writer.close()


def test_what_waits_gives_way_to_what_is_newer(tmp_path):
    flaky = Flaky(store_at(tmp_path), [OSError("HTTP status 503")])
    flaky.gate.clear()
    writer = CheckpointWriter(flaky, first_wait_s=0.01)
    writer.submit(snapshot_of(1))
    while not flaky.asked:
        time.sleep(0.01)
    began = time.perf_counter()
    for step in (2, 3, 4):
        writer.submit(snapshot_of(step))
    assert time.perf_counter() - began < 1.0  # nobody waits for the store
    flaky.gate.set()
    writer.close()
    assert flaky.asked == [1, 4] and store_at(tmp_path).steps() == [4]


@pytest.mark.parametrize("error", [PermissionError("not allowed"), OSError("HTTP status 503")])
def test_a_store_that_does_not_recover_ends_the_run_in_words(error, tmp_path):
    store = store_at(tmp_path)
    writer = CheckpointWriter(Flaky(store, [error] * 100), patience_s=0.2, first_wait_s=0.05)
    writer.submit(snapshot_of(3))
    with pytest.raises(CheckpointError, match=r"step 3 cannot be written: .*; the run has no complete one; see that"):
        writer.flush()
    with pytest.raises(CheckpointError):
        writer.submit(snapshot_of(4))
    writer.close()
    store.write(snapshot_of(2))
    writer = CheckpointWriter(Flaky(store, [error] * 100), patience_s=0.0)
    writer.submit(snapshot_of(3))
    with pytest.raises(CheckpointError, match=r"the newest complete checkpoint is that of step 2; .*same command"):
        writer.flush()
    writer.close()


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_reported_at_once_and_stops_the_run_only_at_its_end(tmp_path, caplog):
    store = store_at(tmp_path)
    store.write(snapshot_of(1))
    flaky = Flaky(store, [FULL] * 100)
    lines: list[str] = []
    writer = CheckpointWriter(flaky, patience_s=0.0, first_wait_s=0.01, warn=lines.append)
    for step in (2, 3):
        writer.submit(snapshot_of(step))
        tried = len(flaky.asked)
        while len(flaky.asked) < tried + 3:  # beyond the patience, which is for other faults
            time.sleep(0.005)
    assert "No space left on device" in caplog.text and "MiB free, the checkpoint needs" in caplog.text
    assert "a crash before that loses all steps after 1" in lines[0] and lines[0] in caplog.text
    with pytest.raises(
        CheckpointError, match=r"step 3 cannot be written: No space .* of step 1; free space there, then"
    ):
        writer.flush()
    writer.close()


def test_a_disk_that_is_full_at_the_end_is_not_waited_for(tmp_path):
    flaky = Flaky(store_at(tmp_path), [FULL] * 100)
    writer = CheckpointWriter(flaky, first_wait_s=1000.0)
    writer.submit(snapshot_of(1))
    while not flaky.asked:
        time.sleep(0.005)
    with pytest.raises(CheckpointError, match="No space left"):  # waits for nothing, or the test's time limit ends it
        writer.flush()
    writer.close()


def test_room_that_is_freed_before_the_end_is_used(tmp_path):
    flaky = Flaky(store_at(tmp_path), [FULL])
    writer = CheckpointWriter(flaky, first_wait_s=1000.0)
    writer.submit(snapshot_of(1))
    while not flaky.asked:
        time.sleep(0.005)
    writer.flush()
    assert flaky.asked == [1, 1] and store_at(tmp_path).steps() == [1]
    writer.close()


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p), lambda p: torch.optim.SGD(p, momentum=0.9, lr=0.1)])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(make):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    optimizer = make(model.parameters())
    before = checkpoint_bytes(model, optimizer)
    model(torch.rand(8, 64)).sum().backward()
    optimizer.step()
    meta = CheckpointMeta(step=1, config_sha256="", manifest_sha256="")
    snapshot = take_snapshot(model=model, optimizer=optimizer, window={}, config_yaml="", meta=meta)
    state = num_bytes([snapshot.state["model"], snapshot.state["optimizer"]])
    assert checkpoint_bytes(model, optimizer) == state
    assert abs(before - state) <= 4 * 4  # AdamW counts its steps, a number a parameter


def test_a_disk_without_room_for_a_checkpoint_is_refused_with_both_figures(tmp_path, monkeypatch, caplog):
    store = store_at(tmp_path / "not" / "there" / "yet")
    store.check_space(1 << 10)
    assert not caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=90 << 20))
    with pytest.raises(
        ConfigError, match=r"yet: the disk has 90 MiB free, a checkpoint of this run needs 140 MiB; free"
    ):
        store.check_space(140 << 20)
    store.check_space(80 << 20)
    assert "will need about 240 MiB" in caplog.text  # two that stay, and the one that is written


def test_a_disk_that_fills_up_while_a_file_is_synced_leaves_no_part_of_it(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    store.write(snapshot_of(1))

    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(snapshot_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("damage", ["", '{"step": 1,', "[]"])
def test_a_damaged_best_checkpoint_counts_as_none(damage, tmp_path):
    store = store_at(tmp_path, best_metric="eval/sga")
    store.write(snapshot_of(1, **{"eval/sga": 0.5}))
    (tmp_path / "best" / "step_00000001" / "meta.json").write_text(damage)
    assert store.best() is None
    store.write(snapshot_of(2, **{"eval/sga": 0.2}))
    assert store.best() == (2, f"{store.folder}/best/step_00000002")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step_00000002"]


def test_a_best_copy_that_fails_costs_no_complete_checkpoint(tmp_path, monkeypatch):
    store = store_at(tmp_path, keep=1, best_metric="eval/sga")
    store.write(snapshot_of(1, **{"eval/sga": 0.1}))
    newest = snapshot_of(2, **{"eval/sga": 0.2})
    keep_best = store._keep_best

    def fails(snapshot: Snapshot) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_keep_best", fails)
    for _ in range(2):
        with pytest.raises(OSError):
            store.write(newest)
        assert store.steps() == [2]
    written = (tmp_path / "step_00000002" / "state.pt").stat().st_ino
    monkeypatch.setattr(store, "_keep_best", keep_best)
    assert store.write(newest).step == 2 and store.best()[0] == 2
    assert (tmp_path / "step_00000002" / "state.pt").stat().st_ino == written  # not written again


def test_a_snapshot_does_not_wait_for_the_device():
    """On the fake accelerator of `tests.workloads.copies`, which counts each copy or read that would block the step."""
    copies = pytest.importorskip("tests.workloads.copies")
    model = copies.module_on_device(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = copies.on_device(torch.ones(parameter.shape))
    meta = CheckpointMeta(step=1, config_sha256="", manifest_sha256="")
    with copies.FakeDevice() as device:
        snapshot = take_snapshot(
            model=model,
            optimizer=optimizer,
            window={"train/loss": copies.on_device(torch.tensor(2.0))},
            config_yaml="",
            meta=meta,
        )
    assert not device.waits
    assert float(snapshot.state["window"]["train/loss"]) == 2.0
    assert torch.equal(snapshot.state["model"]["0.weight"], copies.on_host(model[0].weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_from_a_gpu_is_one_asynchronous_copy():
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(20)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.rand(8, 512, device="cuda")).sum().backward()
    optimizer.step()
    meta = CheckpointMeta(step=1, config_sha256="", manifest_sha256="")
    expected = {name: value.cpu() for name, value in model.state_dict().items()}
    busy = torch.rand(4096, 4096, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            busy = busy @ busy
        snapshot = take_snapshot(model=model, optimizer=optimizer, window={}, config_yaml="", meta=meta)
        running = not all(event.query() for event in snapshot.copied)
        with torch.no_grad():
            torch._foreach_zero_(list(model.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert running  # the step did not wait for the copies, nor for the work before them
    snapshot.wait()
    assert all(torch.equal(snapshot.state["model"][name], value) for name, value in expected.items())
    assert snapshot.state["model"]["0.weight"].is_pinned()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """/dev/full is a disk without room: what torch makes of the error must not hide it."""
    store = store_at(tmp_path)
    store.write(snapshot_of(1))
    (tmp_path / "step_00000002").mkdir()

    full = CheckpointStore(LocalFileSystem(), str(tmp_path))
    target = tmp_path / "step_00000002" / "state.pt"
    original = full.filesystem.open_output_stream

    class OnFullDisk:
        def __getattr__(self, name):
            return getattr(LocalFileSystem(), name)

        def open_output_stream(self, path):
            return original("/dev/full" if path == str(target) else path)

    full.filesystem = OnFullDisk()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        full.write(snapshot_of(2))
    assert store_at(tmp_path).steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]  # no room is taken by what is unfinished


def test_what_a_killed_process_left_unfinished_goes_with_the_next_checkpoint(tmp_path):
    store = store_at(tmp_path, keep=2)
    store.write(snapshot_of(4))
    store.write(snapshot_of(6))
    (tmp_path / "step_00000006" / "meta.json").unlink()
    store.write(snapshot_of(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000008"]


def test_a_damaged_later_one_does_not_push_out_a_good_one(tmp_path):
    store = store_at(tmp_path, keep=1)
    for step in (8, 9):
        store.write(snapshot_of(step))
    (tmp_path / "step_00000009" / "state.pt").write_bytes(b"damaged")
    store.write(snapshot_of(5))
    store.write(snapshot_of(6))
    assert store.read_newest().meta.step == 6


def test_meta_is_readable_without_torch(tmp_path):
    store_at(tmp_path).write(snapshot_of(12, **{"eval/sga": 0.25}))
    meta = json.loads((tmp_path / "step_00000012" / "meta.json").read_text())
    assert meta["step"] == 12 and meta["metrics"] == {"eval/sga": 0.25} and len(meta["state_sha256"]) == 64
