"""Reports that may be lost with a worker's node come again with the checkpoint that is newer than they are."""

import threading
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from orchestrator.training import worker as ray_runtime
from orchestrator.training.reports import Report, ReportSender, UnconfirmedReports
from workloads.storage.checkpoint import CheckpointMeta, Snapshot


def test_a_report_is_kept_until_two_later_ones_were_sent():
    reports = UnconfirmedReports()
    for step in range(1, 6):
        reports.add(Report(step=step, time_ms=7, metrics={"train/loss": 0.5}, node={"address": "a"}, artifacts="x"))
    assert [line["step"] for line in reports.lines()] == [1, 2, 3, 4, 5]
    assert reports.lines()[0] == {"step": 1, "time_ms": 7, "train/loss": 0.5}
    for left in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [4, 5]):
        reports.sent()
        assert [line["step"] for line in reports.lines()] == left


def make_runtime(folder: Path) -> ray_runtime.RayRuntime:
    job = ray_runtime.WorkerJob(
        config={},
        storage=str(folder),
        keep_checkpoints=2,
        best_metric=None,
        patience_s=5.0,
        niceness=0,
        threads=1,
        progress_key="unused",
        watch_preemption=False,
        standby=False,
        node_load=False,
        gauges_of=None,
        began=0.0,
        timings={},
        submitted=0.0,
    )
    return ray_runtime.RayRuntime(job)


def test_what_the_driver_never_got_is_in_the_checkpoint_and_is_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Context:
        def get_world_rank(self) -> int:
            return 0

        def get_world_size(self) -> int:
            return 1

    arrived: list[dict[str, Any]] = []

    def cut(line: dict[str, Any]) -> None:
        if line["step"] > 3:
            raise ConnectionError("the node's link is cut")
        arrived.append(line)

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray_runtime, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray_runtime, "ProgressPublisher", lambda _: None)
    monkeypatch.setattr(ray.train, "report", cut)
    lost = make_runtime(tmp_path)
    for step in range(1, 7):
        lost._sender.send(Report(step=step, time_ms=step, metrics={"train/loss": 1.0 / step}))
    lost._sender.close(10)
    meta = CheckpointMeta(step=6, config_sha256="c", manifest_sha256="m")
    lost._sender._failure = None
    lost.save(Snapshot(meta=meta, config_yaml="", state={"step": 6}))
    lost.flush()

    monkeypatch.setattr(ray.train, "report", arrived.append)
    again = make_runtime(tmp_path)
    assert again.restore().meta.step == 6
    again.close()
    assert [line["step"] for line in arrived] == [1, 2, 3, 2, 3, 4, 5, 6]
    assert all(line["train/loss"] == 1.0 / line["step"] for line in arrived)


def test_folders_that_wait_behind_a_report_that_failed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def fail(line: dict[str, Any]) -> None:
        reached.set()
        go_on.wait(10)
        raise ConnectionError("the controller is gone")

    monkeypatch.setattr(ray.train, "report", fail)
    sender = ReportSender(lambda folder, step: "artifacts/x")
    folders = [tmp_path / str(index) for index in range(4)]
    for folder in folders:
        folder.mkdir()
    report = Report(step=1, time_ms=1, metrics={})
    for folder in folders[:3]:
        sender.send(report, folder)
    assert reached.wait(10)
    go_on.set()
    sender.close(10)
    with pytest.raises(ConnectionError):
        sender.send(report, folders[3])
    assert not any(folder.exists() for folder in folders)


def test_a_report_survives_its_flat_form() -> None:
    report = Report(step=3, time_ms=7, metrics={"eval/sga": 0.5}, node={"address": "10.0.0.1"}, artifacts="artifacts/x")
    assert Report.from_line(report.to_line()) == report
