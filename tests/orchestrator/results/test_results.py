"""What is made of a finished run when its newest model was cut short, and when the command is terminated."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pyarrow.fs import LocalFileSystem

from orchestrator.cli.app import run
from orchestrator.experiments.load import load_experiment
from orchestrator.tracking.client import quiet_mlflow
from orchestrator.tracking.models.logged_model import log_checkpoint
from tests.orchestrator.conftest import write_experiment
from workloads.loops.pretrain import pretrain
from workloads.parallel.runtime import LocalRuntime


@dataclass
class Finished:
    """A run in MLflow with models of steps 2 and 4."""

    run_id: str
    client: MlflowClient
    states: dict[int, Path]  # step → weights of its model in MLflow

    @property
    def store(self) -> list[str]:
        return ["--tracking-uri", self.client.tracking_uri]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, str]) -> Finished:
    quiet_mlflow()
    folder = tmp_path_factory.mktemp("finished")
    file = write_experiment(folder, datasets, workers=1)
    keys = ["steps=4", "checkpoint_every=2", "evaluation.every_steps=2", "evaluation.at_start=false"]
    experiment = load_experiment(str(file), keys)
    with LocalRuntime(folder / "run") as runtime:
        pretrain(experiment.science, runtime)
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    logged_in = client.create_experiment("tiny", artifact_location=(folder / "mlartifacts").as_uri())
    run_id = client.create_run(logged_in, run_name="done").info.run_id
    client.log_param(run_id, "name", "tiny")
    client.log_artifacts(run_id, str(folder / "run" / "artifacts"))
    states = {}
    for step in (2, 4):
        checkpoint = str(folder / "run" / "checkpoints" / f"step_{step:08d}")
        log_checkpoint(checkpoint, LocalFileSystem(), run_id=run_id, uri=uri, step=step)
        (states[step],) = set((folder / "mlartifacts").rglob("state.pt")) - set(states.values())
    return Finished(run_id, client, states)


@pytest.fixture
def cut(finished: Finished) -> Iterator[Finished]:
    """`finished`, the newest model of which was cut by a full disk."""
    weights = finished.states[4].read_bytes()
    finished.states[4].write_bytes(weights[:1000])
    yield finished
    finished.states[4].write_bytes(weights)


def test_the_model_before_a_damaged_one_is_evaluated_exported_and_promoted_and_that_is_said(
    cut: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert run(["evaluate", "done", *cut.store]) == 0
    said = "run done: using the model of step 2, because newer ones are damaged"
    assert caplog.text.count(said) == 1 and "state.pt is damaged (1000 bytes do not match" in caplog.text
    history = cut.client.get_metric_history(cut.run_id, "eval/sga")
    assert [metric.step for metric in history] == [2]
    assert run(["export", "done", "--format", "safetensors", "--output", str(tmp_path), *cut.store]) == 0
    assert run(["promote", "done", "--gate", "eval/sga >= 0", *cut.store]) == 0
    assert caplog.text.count(said) == 3
    assert cut.client.get_model_version_by_alias("tiny", "champion").tags["run.step"] == "2"


def test_without_a_whole_model_the_reason_is_given(cut: Finished, capsys: pytest.CaptureFixture[str]):
    weights = cut.states[2].read_bytes()
    cut.states[2].write_bytes(b"")
    try:
        assert run(["evaluate", "done", *cut.store]) == 1
    finally:
        cut.states[2].write_bytes(weights)
    said = capsys.readouterr().err
    assert "run done: no model of it in MLflow is complete" in said and "restore its artifacts" in said


def test_a_run_without_a_model_is_refused(finished: Finished, capsys: pytest.CaptureFixture[str], coco: dict[str, str]):
    finished.client.create_run(finished.client.get_run(finished.run_id).info.experiment_id, run_name="empty")
    for command in (["evaluate"], ["one-shot", "--data", coco["val"]], ["export"], ["promote"]):
        assert run([*command, "empty", *finished.store]) == 2
        assert "run empty has no model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "one-shot"])
def test_sigterm_ends_the_command_in_one_sentence(
    finished: Finished,
    coco: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = threading.Event()

    def terminate() -> None:
        while not list(tmp_path.glob("*/output")) and not ended.is_set():  # created once the signal is handled
            time.sleep(0.01)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    section = "evaluation.protocol" if command == "evaluate" else "protocol"
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate, daemon=True).start()
    try:
        # So many networks would take minutes.
        keys = [f"{section}.untrained_networks=2000", "--data", coco["val"]]
        assert run([command, "done", *keys, *finished.store]) == 1
    finally:
        ended.set()
    assert "stopped on request (SIGTERM) before the end" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(tmp_path.iterdir())
