"""What a user gets wrong is answered in one sentence, with an exit code, before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.app import run


def test_help_imports_nothing_heavy() -> None:
    code = "import orchestrator.cli.app, sys; sys.exit(bool({'torch', 'ray', 'mlflow', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["objective.temprature=0.2"], "did you mean objective.temperature?"),
        (["temperature=0.2"], "did you mean objective.temperature?"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["steps"], "expected key=value"),
        (["steps=0"], "steps"),
        (["scaling.num_workers=0"], "scaling.num_workers"),
        (["tracking.run_name=../elsewhere"], "tracking.run_name"),
        (["global_batch_size=1000"], "global_batch_size"),
        (["scaling.num_workers=9"], "scaling.num_workers"),
        (["data.uri=/nowhere"], "/nowhere"),
        (["evaluation.uri=/nowhere"], "/nowhere"),
        (["storage.path=s3://bucket/runs"], "tracking.uri"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(
    arguments: list[str],
    expected: str,
    experiment: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("orchestrator.runs.identity.open_storage", _refuse)
    assert run(["train", str(experiment), *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (experiment.parent / "runs" / "mlflow.db").exists()


def _refuse(uri: str) -> object:
    raise AssertionError(f"nothing may be claimed for a wrong request, but {uri} was opened")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "anchor_ntxent_caltek"], "did you mean anchor_ntxent_caltech?"),
        (["train", "missing.yaml"], "no such experiment file"),
        (["train"], "Missing argument"),
        (["trian"], "No such command"),
        (["evaluate", "some-run", "--tracking-uri", "sqlite:////nowhere/mlflow.db"], "no MLflow store"),
        (["data", "build", "--source", "zip", "--input", "/nowhere", "--output", "/nowhere/out"], "source"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_shard_that_does_not_match_its_manifest_is_named(
    tmp_path: Path, experiment: Path, datasets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(datasets["train"], damaged)
    shard = next(damaged.glob("shard-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run(["train", str(experiment), f"data.uri={damaged}"]) == 2
    assert shard.name in capsys.readouterr().err


def test_experiments_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiments"]) == 0
    assert "anchor_ntxent_caltech" in capsys.readouterr().out
    assert run(["experiments", "anchor_ntxent_caltech"]) == 0
    assert "objective.temperature = 0.1" in capsys.readouterr().out


def test_the_science_skips_what_the_orchestrator_adds() -> None:
    import dataclasses

    from orchestrator.experiments.load import EXPERIMENTS
    from orchestrator.experiments.sweep_spec import SweepExperiment
    from workloads.loops.dispatch import load_loop
    from workloads.spec.pretrain import ORCHESTRATOR_SECTIONS, PretrainConfig

    added = {field.name for field in dataclasses.fields(SweepExperiment)}
    added -= {field.name for field in dataclasses.fields(PretrainConfig)}
    assert added == set(ORCHESTRATOR_SECTIONS)
    for path in EXPERIMENTS.glob("*/*.yaml"):
        load_loop(path, {})
