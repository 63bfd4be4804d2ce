"""Reports that may be lost with a worker's node come again with the checkpoint that is newer than they are."""

from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import pytest
import ray.train
import torch

from orchestrator.ray_support.node_load import NODE
from orchestrator.training import worker as ray_runtime
from orchestrator.training.unconfirmed_reports import UnconfirmedReports
from workloads.storage.checkpoint import CheckpointMeta, Snapshot
from workloads.storage.checkpoint_store import CheckpointStore


def test_a_report_is_kept_until_two_later_ones_were_sent():
    reports = UnconfirmedReports()
    for step in range(1, 6):
        reports.add({"step": step, "train/loss": 0.5, NODE: {}, "artifacts": "x"})
    assert [line["step"] for line in reports.lines()] == [1, 2, 3, 4, 5]
    assert reports.lines()[0] == {"step": 1, "train/loss": 0.5}
    for left in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [4, 5]):
        reports.sent()
        assert [line["step"] for line in reports.lines()] == left


def make_runtime(folder: Path) -> ray_runtime.RayRuntime:
    return ray_runtime.RayRuntime(
        progress_key="unused",
        checkpoints=CheckpointStore(arrow_fs.LocalFileSystem(), str(folder), keep=2),
        patience_s=5.0,
        watch_preemption=False,
        spare=False,
        gauges_of=None,
        node_load=False,
    )


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
        lost._send({"step": step, "time_ms": step, "train/loss": 1.0 / step})
    lost._reporter.join(10)
    meta = CheckpointMeta(step=6, config_sha256="c", manifest_sha256="m")
    lost._failure = None
    lost.save(Snapshot(meta=meta, config_yaml="", state={"step": 6}))
    lost.flush()

    monkeypatch.setattr(ray.train, "report", arrived.append)
    again = make_runtime(tmp_path)
    assert again.restore().meta.step == 6
    again.close()
    assert [line["step"] for line in arrived] == [1, 2, 3, 2, 3, 4, 5, 6]
    assert all(line["train/loss"] == 1.0 / line["step"] for line in arrived)
