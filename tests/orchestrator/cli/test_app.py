"""The command line: a wrong request is answered in one sentence, with an exit code, before anything starts; help is readable."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.cli.app import app, run
from orchestrator.cli.suggestions import commands_of

HEAVY = ("torch", "ray", "mlflow", "pandas", "sklearn", "pyarrow")
IMPORTED = f"""
import json, sys
from orchestrator.cli.app import run
for request in json.loads(sys.argv[1]):
    code = run(request)
    print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]))
"""


def test_what_needs_no_library_is_answered_without_importing_one(tmp_path: Path) -> None:
    """In one process, in this order: the later requests need torch, which the config classes import."""
    none = [
        ["--help"],
        ["train", "anchor_ntxent_caltek"],
        ["train", "demo", "steps"],
        ["finetune", "demo"],
        ["sweep", "demo"],
        ["promote"],
        ["promote", "--rollback"],
        ["plan", "demo", "--prices"],
        ["cluster", "up", "elsewhere"],
        ["cluster", "up", "--gcs-port", "12000"],
        ["cluster", "render", "slurm", "demo"],
        ["cluster", "render", "aws", "demo"],
        ["submit", "demo"],
        ["submit", "list"],
    ]
    torch = [["train", "demo", "objective.temprature=1"], ["plan", "demo", "data.uri=/nowhere"]]
    foreign = ("RAY_", "MLFLOW_", "AWS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(none + torch)],
        capture_output=True,
        text=True,
        env={**kept, "XDG_STATE_HOME": str(tmp_path)},  # where no cluster was ever started
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if re.fullmatch(r"\[\d, \[.*\]\]", line)]
    assert len(answers) == len(none + torch), done.stderr
    assert answers[: len(none)] == [[0, []], *([2, []] for _ in none[1:])]
    for code, imported in answers[len(none) :]:
        assert code == 2 and not {"ray", "mlflow", "pandas"} & set(imported)


def test_a_refused_request_ends_the_process_with_its_sentence_and_code() -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator", "promote"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: give a run or a sweep to promote, or --rollback --model NAME\n"


def every_command() -> list[list[str]]:
    return [[], *(path.split() for path, _ in commands_of(typer.main.get_command(app)))]


def described(command: list[str]) -> list[str]:
    """The help texts of a command and its parameters, with Rich's escaped brackets as they shall be shown."""
    known: dict[str, Any] = {" ".join(path.split()): found for path, found in commands_of(typer.main.get_command(app))}
    here = known[" ".join(command)] if command else typer.main.get_command(app)
    texts = [here.help or "", *(getattr(parameter, "help", None) or "" for parameter in here.params)]
    return [text.replace("\\[", "[") for text in texts]


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_shows_every_text_as_it_was_written(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich reads [words in brackets] as its markup and leaves them out."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    assert run([*command, "--help"]) == 0

    def plain(text: str) -> str:
        return re.sub(r"[\s│╭╮╰╯─]+", "", text)

    shown = plain(capsys.readouterr().out)
    for text in described(command):
        assert plain(text) in shown, text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"orchestrator {version('orchestrator')}\n"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["trian"], "orchestrator train`?"),
        (["bild"], "data build`?"),
        (["data", "bulid"], "data build`?"),
        (["compare"], "`python -m workloads compare"),
        (["predict"], "`orchestrator export`"),
        (["xyzzy"], "known: "),
        (["train", "demo", "--json", "x"], "plan`, which has it?"),
        (["train", "demo", "--debgu"], "did you mean --debug?"),
        (["evaluate", "run", "--dta", "x"], "did you mean --data?"),
        (["train", "demo", "--xyzzy"], "has --debug, --help"),
    ],
)
def test_an_unknown_command_or_option_gets_the_nearest_one(
    arguments: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No such ") and suggestion in error and error.count("\n") == 1


def test_a_relative_storage_in_rays_cache_of_a_job_is_refused(
    tmp_path: Path, experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert run(["train", str(experiment), "storage.path=runs"]) == 2
    assert "storage.path: runs lies in this job's working directory" in capsys.readouterr().err
    assert not list(job.iterdir())


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
