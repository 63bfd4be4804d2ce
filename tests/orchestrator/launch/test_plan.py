"""The plan of a run: counts against figures by hand and plain pyarrow, measurements against the model itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.cli.app import run
from orchestrator.datasets.build import build_dataset
from orchestrator.experiments.load import load_experiment, load_sweep
from orchestrator.experiments.spec import ScalingConfig, places_read
from orchestrator.launch.calibration import Calibration, CalibrationError, measure
from orchestrator.launch.plan import plan_run, plan_sweep, resource_request
from tests.workloads.data.images import make_folder
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.errors import ConfigError
from workloads.spec.factory import build_objective


def test_what_can_be_counted_is(experiment: Path, datasets: dict[str, str]):
    """24 images in batches of 8; checkpoints at 10 and 20; evaluations of 6 images before and after."""
    plan = plan_run(load_experiment(str(experiment)), calibrate=False)
    assert (plan.steps, plan.steps_per_epoch, plan.images_trained, plan.views_per_step) == (20, 3, 160, 24)
    assert (plan.checkpoints, plan.checkpoints_kept) == (2, 3)  # the newest two, and the best
    assert (plan.evaluations, plan.evaluated_images) == (2, 6)
    files = [pq.ParquetFile(path) for path in Path(datasets["train"]).glob("shard-*.parquet")]
    assert plan.requests_per_epoch == sum(file.num_row_groups for file in files)
    stored = sum(path.stat().st_size for path in Path(datasets["train"]).glob("shard-*.parquet"))
    assert 0.5 * stored < plan.bytes_per_epoch < stored  # all but the footers
    assert plan.hours is None and plan.price is None


@pytest.mark.parametrize(
    ("overrides", "checkpoints", "evaluations"),
    [
        (["checkpoint_every=null", "evaluation.uri=null"], 1, 0),  # a run's last step always has one
        (["checkpoint_every=null", "checkpoint_epochs=2", "evaluation.uri=null"], 4, 0),  # 6 12 18 20
        (["checkpoint_every=8", "evaluation.every_steps=6"], 6, 5),  # 6 8 12 16 18 20; 0 6 12 18 20
        (["evaluation.limit=4"], 2, 2),
    ],
)
def test_checkpoints_and_evaluations_are_those_of_the_loop(experiment: Path, overrides, checkpoints, evaluations):
    plan = plan_run(load_experiment(str(experiment), overrides), calibrate=False)
    assert (plan.checkpoints, plan.evaluations) == (checkpoints, evaluations)


def test_a_few_steps_are_measured(experiment: Path):
    loaded = load_experiment(str(experiment), ["scaling.num_workers=[1, 2]"])
    plan = plan_run(loaded, price=(0.5, 2.0))
    measured = plan.calibration
    assert measured.step_s > 0 and measured.image_evaluation_s > 0 and 0 <= measured.data_wait_share <= 1
    assert 100 * 2**20 < measured.peak_bytes < 8 * 2**30
    parameters = sum(p.numel() for p in build_objective(loaded.science).parameters())
    assert 12 * parameters < measured.checkpoint_bytes < 12.6 * parameters  # float32 weights and AdamW's two moments
    hours = (20 * measured.step_s + 2 * 6 * measured.image_evaluation_s / 2) / 3600
    assert plan.hours == pytest.approx(hours)
    assert plan.price == pytest.approx((hours * 2 * 0.5, hours * 2 * 2.0))
    assert dict(plan.lines())["workers"] == "1 to 2"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of ten images."""
    root = tmp_path_factory.mktemp("labelled")
    make_folder(root / "images", classes=3, per_class=10)
    build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(root / "images"),)), output=str(root / "shards")))
    return str(root / "shards")


def represented(uri: str, *more: str) -> list[str]:
    """Overrides for a run that is measured by its representation alone; 18 images train and 12 test."""
    section = f"{{train_uri: {uri}, view_size: 32, per_class: 6, neighbours: 3, bootstrap: 100}}"
    return ["evaluation.uri=null", f"evaluation.representation={section}", *more]


def test_evaluations_of_the_representation_count(experiment: Path, labelled: str):
    overrides = represented(labelled, "evaluation.every_steps=6", "checkpoint_every=8")
    plan = plan_run(load_experiment(str(experiment), overrides), calibrate=False)
    assert (plan.evaluations, plan.evaluated_images, plan.representation_images) == (5, 0, 30)  # after 0 6 12 18 20
    assert (plan.checkpoints, plan.checkpoints_kept) == (6, 3)  # 6 8 12 16 18 20; the newest two, and the best
    assert dict(plan.lines())["evaluations"] == "5 of 30 images"
    measured = Calibration(
        step_s=1.0,
        data_wait_share=0,
        image_evaluation_s=0,
        representation_image_s=2.0,
        peak_bytes=1,
        checkpoint_bytes=1,
    )
    assert replace(plan, calibration=measured).hours == pytest.approx((20 * 1.0 + 5 * 30 * 2.0) / 3600)


def test_both_kinds_of_evaluation_are_measured(experiment: Path, datasets: dict[str, str], labelled: str):
    overrides = represented(labelled, f"evaluation.uri={datasets['heldout']}")
    measured = measure(load_experiment(str(experiment), overrides))
    assert measured.image_evaluation_s > 0 and measured.representation_image_s > 0


def test_datasets_of_the_representation_and_of_the_ranking_are_places_that_a_run_reads(
    experiment: Path, datasets: dict[str, str], labelled: str
):
    space = "sweep.space.objective.temperature={kind: uniform, low: 0.1, high: 0.2}"
    loaded = load_sweep(
        str(experiment), [*represented(labelled), f"sweep.selection_uri={datasets['selection']}", space]
    )
    assert places_read(loaded) == {
        "data.uri": datasets["train"],
        "evaluation.representation.train_uri": labelled,
        "sweep.selection_uri": datasets["selection"],
    }


def test_what_ray_is_asked_for():
    scaling = ScalingConfig(num_workers=3, cpus_per_worker=4, use_gpu=True, placement="SPREAD")
    assert resource_request(scaling) == {"bundles": [{"CPU": 4, "GPU": 1}] * 3, "strategy": "SPREAD"}


def test_what_train_would_refuse_is_refused(experiment: Path):
    with pytest.raises(ConfigError, match=r"scaling\.num_workers: 9 workers"):
        plan_run(load_experiment(str(experiment), ["scaling.num_workers=9"]), calibrate=False)


def test_steps_that_fail_are_said_to(experiment: Path, datasets: dict[str, str], tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(datasets["train"], broken)
    shard = next(broken.glob("shard-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(CalibrationError, match=rf"steps failed.*{shard.name}"):
        plan_run(load_experiment(str(experiment), [f"data.uri={broken}"]))


def test_the_command_prints_and_writes_it(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    assert run(["plan", str(experiment), "steps=5", "--no-calibrate", "--price", "1", "2", "--json", str(file)]) == 0
    assert "asks Ray for" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["steps"] == 5 and figures["request"]["bundles"] == [{"CPU": 1}] and figures["hours"] is None
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_a_sweeps_plan_is_its_trials_and_the_runs_at_full_length(experiment: Path, datasets: dict[str, str]):
    """5 trials of 8 steps, 2 x 2 runs of 20; the prices add up."""
    file = experiment.with_name("sweep.yaml")
    file.write_text(
        experiment.read_text()
        + f"sweep:\n  selection_uri: {datasets['selection']}\n  trials: 5\n  max_concurrent: 2\n"
        + "  trial: {steps: 8, evaluation.every_steps: 4}\n"
        + "  space: {objective.temperature: {kind: uniform, low: 0.1, high: 0.2}}\n"
    )
    counted = plan_sweep(load_sweep(str(file)), calibrate=False)
    assert (counted.trials, counted.trial.steps, counted.trial.evaluations) == (5, 8, 2)
    assert counted.final is not None
    assert (counted.finals, counted.final.steps, counted.final.evaluations) == (4, 20, 1)
    assert counted.hours is None and counted.price is None

    measured = Calibration(step_s=36.0, data_wait_share=0, image_evaluation_s=0, peak_bytes=1, checkpoint_bytes=1)
    trial, final = (
        replace(part, calibration=measured, price_per_worker_hour=(1.0, 2.0)) for part in (counted.trial, counted.final)
    )
    known = replace(counted, trial=trial, final=final)
    assert known.hours == pytest.approx(3 * 0.08 + 2 * 0.2)  # two at once: three rounds, then two
    assert known.price == pytest.approx((5 * 0.08 + 4 * 0.2, 2 * (5 * 0.08 + 4 * 0.2)))
    assert json.loads(known.to_json())["hours"] == pytest.approx(known.hours)


def test_the_command_plans_a_sweep(experiment: Path, datasets: dict[str, str], capsys):
    overrides = [f"sweep.selection_uri={datasets['selection']}", "sweep.trials=3", "sweep.trial.steps=8"]
    space = "sweep.space.objective.temperature={kind: uniform, low: 0.1, high: 0.2}"
    assert run(["plan", str(experiment), "--sweep", "--no-calibrate", space, *overrides]) == 0
    told = capsys.readouterr().out
    assert "at most 3" in told and "4 runs of the winner and the baseline configuration" in told
