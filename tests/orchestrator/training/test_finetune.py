"""`orchestrator finetune` on a real Ray: the same machinery as `train`, from a pretraining run's trunk to a served detector."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from mlflow import MlflowClient

from orchestrator.cli.app import run
from orchestrator.experiments.load import find_experiment, list_experiments, load_experiment
from orchestrator.experiments.spec import FinetuneExperiment
from orchestrator.launch.plan import plan_run
from tests.workloads.data.images import encoded, picture
from workloads.errors import ConfigError

EXPERIMENT = """
loop: finetune
name: tiny_detector
steps: 6
global_batch_size: 4
log_every: 2
checkpoint_every: 3
checkpoint_epochs: null
data: {{uri: {train}, decode_size: 96, decode_threads: 1, io_threads: 1}}
views: {{short_side: 48, long_side: 64}}
detector: {{kind: retinanet, fpn_channels: 16, smallest_anchor: 8.0, statistics: frozen, score_threshold: 0.0}}
optimizer: {{kind: sgd, lr: 0.001}}
evaluation: {{uri: {val}, batch_size: 5, pictures: 1, resamples: 20}}
scaling: {{num_workers: 1, cpus_per_worker: 1, poll_interval_s: 0.1}}
tracking: {{system_metrics: false}}
storage: {{path: {output}}}
failure: {{retries: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of this module share."""
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def experiment(folder: Path, coco: dict[str, str]) -> str:
    """An experiment file for one worker; its output folder is `folder / "runs"`."""
    path = folder / "tiny.yaml"
    path.write_text(EXPERIMENT.format(**coco, output=folder / "runs"))
    return str(path)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch):
    """No cluster, and none left behind."""
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    yield
    ray.shutdown()


def the_run(folder: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return client, found


@pytest.mark.timeout(300)
def test_a_detector_is_trained_tracked_and_kept(without_ray, experiment, folder, capsys):
    assert run(["finetune", experiment, "tracking.run_name=boxes"]) == 0
    client, found = the_run(folder)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"run {found.info.run_id}  mlflow ui")
    assert found.info.status == "FINISHED" and found.data.tags["run.loop"] == "finetune"
    assert found.data.params["detector.kind"] == '"retinanet"' or found.data.params["detector.kind"] == "retinanet"
    assert [p.step for p in client.get_metric_history(found.info.run_id, "train/loss")] == [2, 4, 6]
    assert 0 <= found.data.metrics["eval/ap50"] <= 1
    assert found.data.metrics["eval/images"] == 16
    assert [a.path for a in client.list_artifacts(found.info.run_id, "detections")] == ["detections/step_0000006.png"]
    # The same command again finds nothing left to do.
    assert run(["finetune", experiment, "tracking.run_name=boxes"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_the_kept_detector_takes_jpegs_and_arrays(folder):
    import mlflow

    client, found = the_run(folder)
    mlflow.set_tracking_uri(client.tracking_uri)
    (model,) = client.search_logged_models([found.info.experiment_id])
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    assert loaded.metadata.signature is not None and loaded.input_example["images"].shape == (2, 3, 64, 64)
    pictures = [picture(1, width=64, height=48), picture(2, width=80, height=100)]
    jpegs = np.array([encoded(image) for image in pictures] + [b""], dtype=object)[:2]
    for given, sizes in ((jpegs, [(48, 64), (100, 80)]), (loaded.input_example, [(64, 64)] * 2)):
        results = loaded.predict(given)
        assert len(results) == 2
        for result, (height, width) in zip(results, sizes, strict=True):
            assert 0 < len(result["scores"]) <= 100 and set(result["categories"]) <= {"bar", "square"}
            assert result["boxes_xyxy"].max() <= max(height, width) + 1
    whole = loaded.predict(np.stack([np.asarray(pictures[0], dtype=np.float32).transpose(2, 0, 1) / 255]))
    from_png = io.BytesIO()
    pictures[0].save(from_png, "PNG")
    again = loaded.predict(np.array([from_png.getvalue(), None], dtype=object)[:1])
    np.testing.assert_allclose(whole[0]["boxes_xyxy"], again[0]["boxes_xyxy"], atol=1e-3)


def test_evaluate_measures_a_detector_again_and_on_other_images(folder, coco, capsys):
    client, before = the_run(folder)
    assert run(["evaluate", "boxes", "--tracking-uri", client.tracking_uri]) == 0
    assert the_run(folder)[1].data.metrics.keys() == before.data.metrics.keys()
    assert run(["evaluate", "boxes", "--tracking-uri", client.tracking_uri, "--data", coco["train"]]) == 0
    added = the_run(folder)[1].data.metrics.keys() - before.data.metrics.keys()
    assert added and all(key.startswith("eval/on_train-shards-") for key in added)


def test_a_run_and_a_registered_model_are_exported_with_their_card(folder, tmp_path, capsys):
    client, found = the_run(folder)
    store = ["--tracking-uri", client.tracking_uri]
    one = ["--format", "safetensors", "--output"]
    assert run(["export", "boxes", *one, str(tmp_path / "run"), *store]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert found.info.run_id in card and found.data.tags["data.manifest_sha256"] in card
    assert (
        f"| `eval/ap50` | {found.data.metrics['eval/ap50']:.4f} | {found.data.metrics['eval/ap50_low']:.4f} to" in card
    )
    (model,) = client.search_logged_models([found.info.experiment_id])
    client.create_registered_model("tiny")
    version = client.create_model_version("tiny", model.model_uri, run_id=found.info.run_id, model_id=model.model_id)
    client.set_registered_model_alias("tiny", "champion", version.version)
    for name in ("models:/tiny@champion", "models:/tiny/1"):
        target = tmp_path / name.rpartition("/")[2]
        assert run(["export", name, *one, str(target), *store]) == 0
        first, second = ((path / "resnet18.safetensors").read_bytes() for path in (tmp_path / "run", target))
        assert first[-1000:] == second[-1000:] and name in (target / "README.md").read_text()
    assert run(["export", "models:/tiny@nobody", *one, str(tmp_path / "x"), *store]) == 2
    assert run(["export", "boxes", "--format", "tensorflow", *store]) == 2
    assert "expected one of torchvision, timm" in capsys.readouterr().err


def test_a_command_refuses_an_experiment_of_another_loop(experiment, capsys):
    assert run(["train", experiment]) == 2
    assert "run it by `orchestrator finetune`" in capsys.readouterr().err
    assert run(["finetune", "demo"]) == 2
    assert "run it by `orchestrator train`" in capsys.readouterr().err


def test_a_detectors_experiment_is_planned_and_listed(experiment, coco, capsys):
    loaded = load_experiment(experiment, ["trunk={kind: checkpoint, uri: some/where}", "boxes=b.parquet"])
    assert isinstance(loaded, FinetuneExperiment)
    assert loaded.trunk.uri == str(Path("some/where").absolute()) and loaded.boxes == str(Path("b.parquet").absolute())
    plan = plan_run(load_experiment(experiment), calibrate=False)
    assert (plan.steps, plan.steps_per_epoch, plan.num_images, plan.views_per_step) == (6, 3, 12, 4)
    assert (plan.checkpoints, plan.evaluations, plan.evaluated_images) == (2, 1, 16)
    measured = plan_run(load_experiment(experiment)).calibration
    assert measured.step_s > 0 and measured.image_evaluation_s > 0
    with pytest.raises(ConfigError, match=r"trunk\.uri: .*is not a checkpoint"):
        plan_run(load_experiment(experiment, ["trunk={kind: checkpoint, uri: some/where}"]))
    assert "finetune_retinanet_coco" in list_experiments()
    shipped = load_experiment(str(find_experiment("finetune_retinanet_coco")), loop="finetune")
    assert shipped.storage.best_metric == "eval/ap50"
    assert run(["experiments", "finetune_retinanet_coco"]) == 0
    assert "detector.smallest_anchor = 16.0" in capsys.readouterr().out
