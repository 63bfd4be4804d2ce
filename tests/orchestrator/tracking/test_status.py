"""What a run's record alone says of it."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.cli.app import run
from orchestrator.tracking.status import run_status


def logged(folder: Path, *, status: str | None) -> str:
    """A tracking store with one run that has done 30 of 120 steps; its URI."""
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("pretraining", artifact_location=str(folder / "artifacts"))
    made = client.create_run(experiment, run_name="mine", tags={"ray.submission_id": "mine-1"}).info.run_id
    client.log_param(made, "steps", "120")
    now = int(time.time() * 1000)
    for step in (10, 20, 30):
        client.log_metric(made, "train/loss", 4.0 - step / 100, step=step, timestamp=now - (30 - step) * 2000)
    client.log_metric(made, "train/step_s", 2.0, step=30)
    client.log_metric(made, "train/images_per_s", 12.0, step=30)
    if status is not None:
        client.set_terminated(made, status=status)
    return uri


def test_a_run_on_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    uri = logged(tmp_path, status=None)
    told = run_status("mine", tracking_uri=uri)
    assert told["status"] == "running" and told["step"] == "30 of 120 (25%)"
    assert told["newest"] == "loss 3.700  12 images/s"
    assert told["remaining"] == "about 3 min, evaluations aside"  # 90 steps of 2 s
    assert told["job"] == "mine-1" and "faults" not in told and "score" not in told
    assert told["reported"].endswith("s ago") and int(told["reported"].split()[0]) < 30
    assert run(["status", "mine", "--tracking-uri", uri]) == 0
    assert "30 of 120" in capsys.readouterr().out


def test_a_run_that_has_ended_has_nothing_remaining(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    uri = logged(tmp_path, status="FAILED")
    told = run_status("mine", tracking_uri=uri)
    assert told["status"] == "failed" and "remaining" not in told and "reported" not in told
    assert run(["status", "nobody", "--tracking-uri", uri]) == 2
    assert "no run with this name" in capsys.readouterr().err
