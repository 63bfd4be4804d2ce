"""A real sweep on Ray Tune, its driver killed and resumed: nothing is repeated, nothing is left open, the best is promoted."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from pyarrow.fs import LocalFileSystem
from ray import cloudpickle

from orchestrator.cli.app import run
from orchestrator.experiments.load import load_experiment, load_sweep
from orchestrator.results.promote import Gate, parse_gate
from orchestrator.runs.identity import Run, claim_sweep
from orchestrator.sweeps.checks import check_sweep
from orchestrator.sweeps.run import _with_address_in_environment
from orchestrator.sweeps.stages import search_stage
from orchestrator.sweeps.tuning import make_optuna, restored
from orchestrator.tracking.addresses import tracking_uri
from tests.orchestrator.conftest import write_experiment
from workloads.config import config_hash
from workloads.errors import ConfigError

pytestmark = pytest.mark.timeout(600)

SWEEP = """
sweep:
  selection_uri: {selection}
  trials: 3
  max_concurrent: 1
  trial: {{steps: 8, evaluation.every_steps: 4, checkpoint_every: 2, evaluation.protocol.crops_per_image: 8}}
  stopper: {{kind: asha, first_step: 4}}
  final_seeds: 1
  space:
    objective.anchor_negatives: {{kind: choice, values: [64, 0]}}
    micro_batch_size: {{kind: choice, values: [null, 4]}}
    backbone.norm: {{kind: choice, values: [group, sync_batch]}}
"""
# A micro-batch and sync_batch do not go together, which each of them alone does not show.
IMPOSSIBLE = {"micro_batch_size": 4, "backbone.norm": "sync_batch"}


def write_sweep(folder: Path, datasets: dict[str, str]) -> Path:
    path = write_experiment(folder, datasets, workers=1)
    path.write_text(path.read_text() + SWEEP.format(**datasets))
    return path


def journals(folder: Path, *, name: str = "tiny-sweep-*") -> dict[str, list[dict[str, Any]]]:
    """Run of a trial → its records."""
    paths = sorted((folder / "runs").glob(f"{name}-*/journal.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines() if line] for path in paths}


def until(condition, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


class Swept:
    """A sweep whose driver was killed in its last trial, and that was then resumed in this process."""

    def __init__(self, folder: Path, datasets: dict[str, str]) -> None:
        self.folder, self.file = folder, write_sweep(folder, datasets)
        command = [sys.executable, "-m", "orchestrator", "sweep", str(self.file)]
        with (folder / "first.log").open("wb") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            until(lambda: (self.finished() and self.second_has_a_checkpoint()) or driver.poll() is not None)
            assert driver.poll() is None, (folder / "first.log").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        self.before = journals(folder)
        self.refused = self.command()
        self.resumed = self.command("--resume")
        self.client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
        everything = [experiment.experiment_id for experiment in self.client.search_experiments()]
        self.runs = self.client.search_runs(everything)

    def command(self, *more: str) -> tuple[int, str]:
        """Exit code and output of `orchestrator sweep`."""
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            code = run(["sweep", str(self.file), *more])
        return code, written.getvalue()

    def finished(self) -> list[Path]:
        return list((self.folder / "runs").glob("tiny-sweep-*-*/finished.json"))

    def second_has_a_checkpoint(self) -> bool:
        begun = [p for p in (self.folder / "runs").glob("tiny-sweep-*-*/checkpoints/step_00000002/meta.json")]
        return any(not (path.parents[2] / "finished.json").exists() for path in begun)

    def stage(self, name: str) -> list[Any]:
        return [found for found in self.runs if found.data.tags.get("sweep.stage") == name]

    @property
    def parent(self) -> Any:
        return self.stage("sweep")[0]

    @property
    def tracking(self) -> list[str]:
        return ["--tracking-uri", f"sqlite:///{self.folder}/runs/mlflow.db"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, str]) -> Iterator[Swept]:
    environment = dict(os.environ)  # Ray and Tune are configured by it
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    try:
        yield Swept(tmp_path_factory.mktemp("sweep"), datasets)
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(environment)


def test_a_killed_sweep_is_continued_only_when_told_to(swept: Swept):
    code, output = swept.refused
    assert code == 2 and "was begun before: --resume continues it" in output
    code, output = swept.resumed
    assert code == 0, output
    assert "Traceback" not in output
    states = list((swept.folder / "runs" / swept.parent.info.run_name / "search").glob("experiment_state-*.json"))
    assert len(states) == 2  # of both drivers: Tune was restored, not started anew


def test_what_finished_is_not_repeated_and_the_rest_goes_on_from_its_checkpoint(swept: Swept):
    after = journals(swept.folder)
    ended = {path.parent.name for path in swept.finished()}
    resumed = 0
    for name, records in swept.before.items():
        assert after[name][: len(records)] == records
        steps = [r["step"] for r in after[name] if r["kind"] == "metrics" and "train/loss" in r["metrics"]]
        resumed += len(after[name]) > len(records)
        assert len(steps) == len(set(steps)), f"{name} logged a step twice"
    assert resumed >= 1 and ended


def test_every_trial_is_one_run_below_the_parent_with_its_true_end(swept: Swept):
    trials = swept.stage("search")
    assert len(trials) == 3 and len(swept.stage("sweep")) == 1
    assert {found.data.tags["mlflow.parentRunId"] for found in trials} == {swept.parent.info.run_id}
    assert {found.info.status for found in swept.runs} <= {"FINISHED", "FAILED"}
    names = [found.info.run_name for found in swept.runs]
    assert len(names) == len(set(names))
    rows = leaderboard(swept)
    by_name = {row["run"]: row for row in rows}
    for found in trials:
        impossible = {k: found.data.params.get(k) for k in IMPOSSIBLE} == {k: str(v) for k, v in IMPOSSIBLE.items()}
        assert (found.info.status == "FAILED") == impossible
        if not impossible:
            history = swept.client.get_metric_history(found.info.run_id, "eval/sga")
            assert [m.step for m in history] in ([4], [4, 8])
            assert int(by_name[found.info.run_name]["step"]) == history[-1].step


def leaderboard(swept: Swept) -> list[dict[str, str]]:
    path = swept.client.download_artifacts(swept.parent.info.run_id, "report/leaderboard.csv")
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_early_stopper_knows_after_the_restart_what_ended_before_it(swept: Swept):
    """The first trial, which ended under the killed driver, finds four times as much at step 4 as the last one."""
    rows = leaderboard(swept)
    assert [row["outcome"] for row in rows] == ["finished", "stopped early", "failed"]
    assert [row["step"] for row in rows] == ["8", "4", "0"]
    ended = [r for r in swept.stage("search") if r.data.tags.get("sweep.outcome") == "stopped early"]
    assert [r.info.status for r in ended] == ["FINISHED"]


def test_a_trial_that_cannot_work_is_recorded_with_its_reason_and_the_sweep_goes_on(swept: Swept):
    failed = [row for row in leaderboard(swept) if row["outcome"] == "failed"]
    assert len(failed) == 1 and "sync_batch normalises over all of the batch" in failed[0]["reason"]
    (found,) = [r for r in swept.stage("search") if r.info.status == "FAILED"]
    assert "sync_batch normalises over all of the batch" in found.data.tags["run.failure"]


def test_the_parent_holds_the_result(swept: Swept):
    metrics, tags = swept.parent.data.metrics, swept.parent.data.tags
    rows = leaderboard(swept)
    assert [int(row["place"]) for row in rows] == [1, 2, 3] and rows[0]["outcome"] == "finished"
    assert metrics["sweep/trials"] == 3 and metrics["sweep/failed"] == 1
    assert metrics["sweep/score"] == pytest.approx(float(rows[0]["score"]))
    assert metrics["sweep/trial_steps"] == sum(int(row["step"]) for row in rows)
    assert tags["sweep.best_run"] == rows[0]["run"]
    report = {item.path for item in swept.client.list_artifacts(swept.parent.info.run_id, "report")}
    assert report == {
        f"report/{n}" for n in ("best.yaml", "effects.png", "leaderboard.csv", "parallel_coordinates.png")
    }


def test_the_best_configuration_is_a_ready_experiment(swept: Swept, tmp_path: Path):
    path = swept.client.download_artifacts(swept.parent.info.run_id, "report/best.yaml", str(tmp_path))
    best, row = load_experiment(path), leaderboard(swept)[0]
    assert best.steps == 20 and str(best.objective.anchor_negatives) == row["objective.anchor_negatives"]
    assert best.backbone.norm == row["backbone.norm"]
    assert best.evaluation.uri == load_experiment(str(swept.file)).evaluation.uri


def test_the_held_out_images_are_opened_only_at_full_length(swept: Swept):
    labels = {r.info.run_name: {i.dataset.name for i in r.inputs.dataset_inputs} for r in swept.stage("search")}
    assert all("heldout" not in names for names in labels.values())
    for found in swept.stage("final"):
        assert "heldout" in {item.dataset.name for item in found.inputs.dataset_inputs}
        history = swept.client.get_metric_history(found.info.run_id, "eval/sga")
        assert [metric.step for metric in history] == [20]


def test_promotion_needs_its_gates_and_a_gain_and_can_be_taken_back(swept: Swept, capsys):
    name = swept.parent.info.run_name
    assert run(["promote", name, "--gate", "eval/sga >= 1.1", *swept.tracking]) == 1
    assert "eval/sga >= 1.1 does not hold" in capsys.readouterr().err
    assert run(["promote", name, "--gate", "eval/nothing >= 0", *swept.tracking]) == 1
    assert "has no eval/nothing" in capsys.readouterr().err
    assert not swept.client.search_registered_models()
    assert run(["promote", name, "--gate", "eval/sga >= 0", *swept.tracking]) == 0
    version = swept.client.get_model_version_by_alias("tiny", "champion")
    winner = swept.client.get_run(version.run_id)
    assert winner.info.run_name == swept.parent.data.tags["sweep.winner_run"]
    for key in ("data.manifest_sha256", "config.sha256", "ray.job_id"):
        assert version.tags[key] == winner.data.tags[key]
    assert float(version.tags["eval/sga"]) == pytest.approx(winner.data.metrics["eval/sga"], abs=1e-5)
    assert {"eval/sga_low", "eval/sga_high", "promotion.gates"} <= version.tags.keys()
    assert run(["promote", name, *swept.tracking]) == 1
    assert "is already the model of run" in capsys.readouterr().err

    store = [f"tracking.uri={swept.tracking[1]}", f"storage.path={swept.folder}/runs"]
    assert run(["train", str(swept.file), "seed=7", "steps=4", "tracking.run_name=other", *store]) == 0
    assert run(["promote", "other", *swept.tracking]) == 1
    assert "is not above 0 beyond its interval" in capsys.readouterr().err
    assert run(["promote", "other", "--force", *swept.tracking]) == 0
    promoted = swept.client.get_model_version_by_alias("tiny", "champion")
    assert promoted.tags["run.name"] == "other" and "promotion.forced_over" in promoted.tags
    assert run(["promote", "--rollback", "--model", "tiny", *swept.tracking]) == 0
    assert swept.client.get_model_version_by_alias("tiny", "champion").version == version.version
    trial = swept.stage("search")[0].info.run_name
    assert run(["promote", trial, *swept.tracking]) == 2
    assert "has no model" in capsys.readouterr().err
    assert run(["promote", "--rollback", "--model", "tiny", *swept.tracking]) == 2
    assert "no version had the alias before it" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", [None, "tuner.pkl", "experiment_state-*.json", "basic-variant-state-*.json"])
def test_state_of_tune_that_a_kill_has_cut_is_discarded(swept: Swept, tmp_path: Path, caplog, pattern: str | None):
    """Its trials are then started anew, and found by their names."""
    experiment = load_sweep(str(swept.file))
    stage = search_stage(experiment, name=swept.parent.info.run_name, parent=None)
    storage = {
        "config_sha256": "",
        "manifest_sha256": "",
        "filesystem": LocalFileSystem(),
        "storage_path": str(tmp_path),
    }
    copied = Run(name=stage.name, claim="", **storage)
    shutil.copytree(swept.folder / "runs" / stage.name, copied.folder)
    if pattern is not None:
        newest = max(Path(copied.folder, "search").glob(pattern))
        newest.write_bytes(newest.read_bytes()[:-100])
    assert (restored(stage, copied, debug=False) is None) == (pattern is not None)
    assert Path(copied.folder, "search").exists() == (pattern is None)
    assert ("its trials are continued by their names" in caplog.text) == (pattern is not None)


READER = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("ray", "typer", "rich", "boto3", "optuna", "orchestrator"):
                raise ModuleNotFoundError(f"{name} is not installed here")

    sys.meta_path.insert(0, Absent())
    tracking, heldout = sys.argv[1:]
    import mlflow
    import numpy as np
    mlflow.set_tracking_uri(tracking)
    loaded = mlflow.pyfunc.load_model("models:/tiny@champion")
    import workloads
    assert "mlflow" in workloads.__file__ or "artifacts" in workloads.__file__, workloads.__file__
    shapes = [loaded.predict({"images": np.zeros((n, 3, 64, 64), np.float32)})["P3"].shape for n in (1, 3)]
    assert [shape[0] for shape in shapes] == [1, 3], shapes
    from workloads.data.store.manifest import open_dataset
    from workloads.data.loading.loaders import DataConfig, EvalLoader
    from workloads.metrics import grid_accuracy
    model = loaded.unwrap_python_model()
    settings = model.settings.evaluation
    dataset = open_dataset(heldout)
    reading = DataConfig(uri=heldout, decode_size=None)
    batches = lambda: iter(EvalLoader(dataset, reading, batch_size=4))
    tables = grid_accuracy.merge([grid_accuracy.measure(model.module, [], batches, settings.protocol)])
    print("SGA", grid_accuracy.summarize(tables, settings.protocol)["eval/sga"])
"""


def test_the_champion_loads_where_only_torch_and_mlflow_are_and_scores_the_same(
    swept: Swept, datasets: dict[str, str], tmp_path: Path
):
    run(["promote", swept.parent.info.run_name, *swept.tracking])
    script = tmp_path / "read.py"
    script.write_text(textwrap.dedent(READER))
    command = [sys.executable, str(script), swept.tracking[1], datasets["heldout"]]
    read = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert read.returncode == 0, read.stderr
    version = swept.client.get_model_version_by_alias("tiny", "champion")
    logged = swept.client.get_run(version.run_id).data.metrics["eval/sga"]
    assert float(read.stdout.split()[-1]) == pytest.approx(logged, abs=1e-6)


def test_optuna_learns_and_remembers(tmp_path: Path, datasets: dict[str, str]):
    """The searcher as Tune drives it, stored and restored half-way: the start first, then other points of the space."""
    space = "sweep.space.objective.temperature={kind: loguniform, low: 0.05, high: 0.5}"
    given = [space, "sweep.searcher={kind: optuna, random_trials: 2}"]
    stage = search_stage(load_sweep(str(write_sweep(tmp_path, datasets)), given), name="optuna", parent=None)
    searcher, points = make_optuna(stage), []
    for number in range(12):
        point = stage.point_of(searcher.suggest(str(number)))
        points.append(point)
        searcher.on_trial_complete(str(number), {"score": -abs(point["objective.temperature"] - 0.3)})
        if number == 5:
            searcher.save(str(tmp_path / "searcher"))
            searcher = make_optuna(stage)
            searcher.restore(str(tmp_path / "searcher"))
    assert points[0] == stage.space.baseline()
    assert len({json.dumps(point) for point in points}) == 12
    late = [abs(point["objective.temperature"] - 0.3) for point in points[8:]]
    assert sorted(late)[1] < 0.1, points


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.space.objective.temprature={kind: uniform, low: 0, high: 1}"], "did you mean objective.temperature"),
        (["sweep.space.objective.temperature={kind: uniform, low: -1, high: 1}"], "sweep.space.objective.temperature"),
        (["sweep.space.evaluation.protocol.grid={kind: choice, values: [8]}"], "the evaluation section is the same"),
        (["sweep.trial.stps=4"], "sweep.trial: unknown key stps"),
        (["sweep.trial.objective.anchor_negatives=4"], "this key is searched"),
        (["sweep.trial.evaluation.every_steps=null"], "a trial is first evaluated at step 8"),
        (["sweep.selection_uri={heldout}"], "this is the held-out set"),
        (["sweep.selection_uri={train}"], "these are the training images"),
        (["sweep.searcher.kind=grid"], "the grid has 8 points, more than 3 trials"),
        (["evaluation.uri=null"], "needed to compare the winner"),
        (["sweep.searcher.kind=optuna", "objective.anchor_negatives=7"], "own value 7 is not in it"),
        (["sweep.searchr.kind=grid"], "unknown key sweep.searchr"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_sentence(tmp_path: Path, datasets: dict[str, str], overrides, message):
    path = write_sweep(tmp_path, datasets)
    given = [text.replace("{heldout}", datasets["heldout"]).replace("{train}", datasets["train"]) for text in overrides]
    with pytest.raises(ConfigError, match=message) as caught:
        check_sweep(load_sweep(str(path), given))
    assert "\n" not in str(caught.value)


def test_a_file_with_a_sweep_section_is_its_own_start(tmp_path: Path, datasets: dict[str, str]):
    path = write_sweep(tmp_path, datasets)
    assert load_experiment(str(path)) == load_sweep(str(path)).start
    with pytest.raises(ConfigError, match="has no search space"):
        load_sweep(str(write_experiment(tmp_path, datasets, workers=1)))


@pytest.mark.parametrize("text", ["eval/sga", "eval/sga = 0.4", "eval/sga >= much", ">= 0.4", "eval/sga >= 0.4.1"])
def test_a_gate_that_cannot_be_read_is_refused(text: str):
    with pytest.raises(ConfigError, match="--gate"):
        parse_gate(text)


def test_gates_are_judged():
    assert parse_gate("eval/sga>=0.45") == Gate(metric="eval/sga", sign=">=", bound=0.45)
    assert parse_gate("eval/sga >= 0.45").failure({"eval/sga": 0.45}) is None
    assert "it is 0.4400" in str(parse_gate("eval/sga > 0.44").failure({"eval/sga": 0.44}))
    assert parse_gate("train/loss < 1e1").failure({"train/loss": 3.0}) is None


def test_a_password_in_the_tracking_address_is_not_pickled_into_the_storage(
    datasets, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "overwritten")
    address = "http://someone:secret-word@127.0.0.1:5000"
    experiment = load_sweep(str(write_sweep(tmp_path, datasets)), [f"tracking.uri={address}"])
    moved = _with_address_in_environment(experiment)
    assert b"secret-word" in cloudpickle.dumps(experiment) and b"secret-word" not in cloudpickle.dumps(moved)
    assert os.environ["MLFLOW_TRACKING_URI"] == address == tracking_uri(moved)
    assert config_hash(moved.science) == config_hash(experiment.science)


def test_a_sweep_that_is_sent_as_a_job_may_be_begun_or_continued(datasets, tmp_path):
    """Jobs always ask to continue, because they are sent again after a fault."""
    experiment = load_sweep(str(write_sweep(tmp_path, datasets)))
    first = claim_sweep(experiment, "sent", identity="i", resume=True)
    assert claim_sweep(experiment, "sent", identity="i", resume=True).claim == first.claim
    with pytest.raises(ConfigError, match="--resume continues it"):
        claim_sweep(experiment, "sent", identity="i", resume=False)
