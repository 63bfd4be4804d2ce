"""Real sweeps: too long for every commit."""

import contextlib
import csv
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.cli.app import run
from tests.orchestrator.conftest import datasets
from tests.orchestrator.sweeps.test_run import journals, write_sweep

__all__ = ["datasets"]


@pytest.mark.short
def test_optuna_with_median_stopping_over_trials_of_two_workers(tmp_path: Path, datasets: dict[str, str]):
    path = write_sweep(tmp_path, datasets)
    given = [
        *("sweep.searcher={kind: optuna, random_trials: 1}", "sweep.stopper={kind: median, first_step: 4}"),
        *("sweep.space.micro_batch_size=null", "sweep.space.backbone.norm=null", "sweep.final_seeds=0"),
        "sweep.space.objective.temperature={kind: loguniform, low: 0.05, high: 0.5}",
        *("sweep.trials=3", "scaling.num_workers=2", "tracking.run_name=optuna"),
    ]
    assert run(["sweep", str(path), *given]) == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "optuna" / "report" / "leaderboard.csv").read_text().splitlines()))
    assert len(rows) == 3 and all(row["outcome"] in ("finished", "stopped early") for row in rows)
    assert "0.1" in [row["objective.temperature"] for row in rows]  # the baseline configuration, asked for first
    assert len({row["objective.temperature"] for row in rows}) == 3
    assert all(0.05 <= float(row["objective.temperature"]) <= 0.5 for row in rows)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_says_so_and_is_continued(
    tmp_path: Path, datasets: dict[str, str], stop: signal.Signals
):
    """Even where the kill of an earlier driver has cut the state of Tune, without repeating a step."""
    path = write_sweep(tmp_path, datasets)
    alone = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    given = ["sweep.final_seeds=0", "sweep.trials=2", "sweep.space.micro_batch_size=null", "tracking.run_name=stopped"]
    command = [sys.executable, "-m", "orchestrator", "sweep", str(path), *given]
    controller, terminal = pty.openpty()  # where there is a terminal, people also see a bar
    with os.fdopen(controller, "rb", buffering=0) as screen:
        driver = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=alone, start_new_session=True)
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal's end, on Linux
            while part := screen.read(4096):
                shown += part
                if b"step 4" in shown and driver.poll() is None and b"^C" not in shown:
                    os.kill(driver.pid, stop)
                    shown += b"^C"
    assert driver.wait(60) == 1, shown.decode()
    text = shown.decode()
    assert "trials" in text and "0/2" in text  # the bar
    assert "sweep stopped: stopped; --resume continues it" in " ".join(text.split())
    assert "Traceback" not in text
    runs = stages(tmp_path)
    assert [run.info.status for run in runs["sweep"]] == ["KILLED"]
    assert {run.info.status for run in runs["search"]} == {"KILLED"}

    before = journals(tmp_path, name="stopped")
    assert any(record["metrics"].get("eval/sga") for records in before.values() for record in metrics_of(records))
    if stop == signal.SIGTERM:
        tuner = tmp_path / "runs" / "stopped" / "search" / "tuner.pkl"
        tuner.write_bytes(tuner.read_bytes()[:-100])
    again = subprocess.run([*command, "--resume"], env=alone, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    runs = stages(tmp_path)
    assert [run.info.status for run in runs["sweep"]] == ["FINISHED"]
    assert [run.info.status for run in runs["search"]] == ["FINISHED", "FINISHED"]
    assert ("its trials are continued by their names" in again.stderr) == (stop == signal.SIGTERM)
    for records in journals(tmp_path, name="stopped").values():
        steps = [record["step"] for record in metrics_of(records) if "train/loss" in record["metrics"]]
        assert len(steps) == len(set(steps))


def metrics_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == "metrics"]


def stages(folder: Path) -> dict[str, list[Any]]:
    """The tracked runs of the sweep in `folder`, by what they are in it."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    found: dict[str, list[Any]] = {"sweep": [], "search": []}
    for one in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        found[one.data.tags["sweep.stage"]].append(one)
    return found
