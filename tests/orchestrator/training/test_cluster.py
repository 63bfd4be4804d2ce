"""A real Ray cluster of two raylets: training, failing, continuing, evaluating."""

import collections
import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from orchestrator.cli.app import run
from orchestrator.experiments.load import load_experiment
from orchestrator.ray_support.session import RESUBMITTED, check_resources
from tests.orchestrator.conftest import write_experiment
from tests.orchestrator.training.test_finetune import EXPERIMENT as DETECTOR
from workloads.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]  # seven processes import torch before the first step


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's spelling; raylets take it from who starts them
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of this module share."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def two_workers(folder: Path, datasets: dict[str, str]) -> Path:
    """An experiment for two workers, one on each node."""
    return write_experiment(folder, datasets, workers=2)


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `orchestrator` sees on a cluster's node."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    ray.shutdown()


def runs_of(folder: Path) -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    return client, client.search_runs([e.experiment_id for e in client.search_experiments()])


def histories(client: MlflowClient, found: Any) -> dict[str, list[tuple[int, float]]]:
    run_id = found.info.run_id
    return {
        key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        for key in found.data.metrics
    }


def test_two_workers_on_two_nodes_train_one_tracked_run(
    on_cluster: None, two_workers: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(two_workers), "tracking.run_name=both"]) == 0
    client, found = runs_of(folder)
    assert [item.info.run_name for item in found] == ["both"]
    assert found[0].info.status == "FINISHED"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"run {found[0].info.run_id}  mlflow ui")

    points = histories(client, found[0])
    assert [step for step, _ in points["train/loss"]] == [5, 10, 15, 20]
    assert points["train/loss"][-1][1] < points["train/loss"][0][1]
    assert {step for step, _ in points["eval/sga"]} == {0, 20}
    for key, history in points.items():
        repeated = [step for step, times in collections.Counter(step for step, _ in history).items() if times > 1]
        assert not repeated, f"{key} was logged twice at steps {repeated}"
    assert {"startup/total_s", "startup/ray_s", "startup/workers_s", "startup/first_step_s"} <= points.keys()

    run_id, tags = found[0].info.run_id, found[0].data.tags
    assert {"config.sha256", "data.manifest_sha256", "ray.job_id"} <= tags.keys()
    assert {item.dataset.name for item in found[0].inputs.dataset_inputs} == {"train", "heldout"}
    assert len(client.list_artifacts(run_id, "heatmaps")) == 4
    checkpoints = [path for path in (folder / "runs" / "both" / "checkpoints").glob("step_*") if path.is_dir()]
    assert len(checkpoints) == 2 and all((path / "meta.json").is_file() for path in checkpoints)


def test_the_same_command_again_adds_nothing(on_cluster: None, two_workers: Path, folder: Path) -> None:
    client, before = runs_of(folder)
    assert run(["train", str(two_workers), "tracking.run_name=both"]) == 0
    client, after = runs_of(folder)
    assert [item.info.run_id for item in after] == [item.info.run_id for item in before]
    assert {k: v for k, v in histories(client, after[0]).items() if k.startswith(("train/", "eval/"))} == {
        k: v for k, v in histories(client, before[0]).items() if k.startswith(("train/", "eval/"))
    }


def test_the_logged_model_takes_another_batch_and_image_size(folder: Path) -> None:
    import mlflow
    import numpy as np

    client, found = runs_of(folder)
    mlflow.set_tracking_uri(client.tracking_uri)
    models = client.search_logged_models([found[0].info.experiment_id])
    loaded = mlflow.pyfunc.load_model(models[0].model_uri)
    for count, size in ((1, 64), (3, 64), (2, 96)):
        pyramid = loaded.predict(np.random.default_rng(0).random((count, 3, size, size), dtype=np.float32))
        assert pyramid["P3"].shape == (count, 16, size // 8, size // 8)
    stored = Path(models[0].artifact_location.removeprefix("file://"))
    assert not list(stored.rglob("*.pkl"))


def test_evaluate_agrees_with_the_run_and_names_another_dataset(
    folder: Path, datasets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    client, before = runs_of(folder)
    store = ["--tracking-uri", client.tracking_uri]
    assert run(["evaluate", "both", *store]) == 0
    assert runs_of(folder)[1][0].data.metrics.keys() == before[0].data.metrics.keys()
    assert run(["evaluate", before[0].info.run_id, *store, "--data", datasets["train"], "limit=8"]) == 2
    assert "evaluation.limit" in capsys.readouterr().err
    assert run(["evaluate", before[0].info.run_id, *store, "--data", datasets["train"], "evaluation.limit=8"]) == 0
    client, after = runs_of(folder)
    added = after[0].data.metrics.keys() - before[0].data.metrics.keys()
    assert added and all(key.startswith("eval/on_train-") for key in added)
    for history in histories(client, after[0]).values():
        assert len({step for step, _ in history}) == len(history)


def test_one_shot_figures_and_a_gallery_are_added_to_the_run(
    folder: Path, coco: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    client, _ = runs_of(folder)
    few = ["protocol.view_size=64", "protocol.crop_size=16", "protocol.grid=8", "protocol.least_side=8", "gallery=1"]
    few += ["protocol.untrained_networks=1", "protocol.resamples=20", "protocol.pixel_windows=[8]"]
    command = ["one-shot", "both", "--data", coco["val"], "--tracking-uri", client.tracking_uri]
    assert run([*command, *few]) == 0
    assert "one_shot/pointing_over_untrained" in capsys.readouterr().out
    client, found = runs_of(folder)
    both = next(item for item in found if item.info.run_name == "both")
    added = [key for key in both.data.metrics if "one_shot" in key]
    assert added and all(key.startswith("eval/on_val-shards-") for key in added)
    (place,) = client.list_artifacts(both.info.run_id, "gallery")
    assert {Path(item.path).suffix for item in client.list_artifacts(both.info.run_id, place.path)} == {".png", ".csv"}
    assert run([*command, "protocol.grids=8"]) == 2
    assert "did you mean protocol.grid?" in capsys.readouterr().err


def test_two_workers_fine_tune_a_detector_on_the_runs_trunk(
    on_cluster: None, folder: Path, coco: dict[str, str], tmp_path: Path
) -> None:
    trunk = max((folder / "runs" / "both" / "checkpoints").glob("step_*"))
    path = tmp_path / "detector.yaml"
    path.write_text(DETECTOR.format(**coco, output=folder / "runs") + f"trunk: {{kind: checkpoint, uri: {trunk}}}\n")
    assert run(["finetune", str(path), "tracking.run_name=boxes", "scaling.num_workers=2"]) == 0
    client, found = runs_of(folder)
    detector = next(item for item in found if item.info.run_name == "boxes")
    points = histories(client, detector)
    assert [step for step, _ in points["train/loss"]] == [2, 4, 6] and points["eval/images"] == [(6, 16)]


def test_a_loss_that_is_no_number_fails_the_run(
    on_cluster: None, two_workers: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["optimizer.lr=1e30", "tracking.run_name=broken", "evaluation.uri=null", "failure.retries=3"]
    assert run(["train", str(two_workers), *overrides]) == 1
    captured = capsys.readouterr()
    assert "the loss is nan" in captured.err and captured.err.count("\n") == 1
    assert "continuing" not in captured.out  # what would fail again is not tried again
    _, found = runs_of(folder)
    assert {item.info.run_name: item.info.status for item in found}["broken"] == "FAILED"


def test_more_workers_than_the_cluster_holds_are_refused(
    on_cluster: None, two_workers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(two_workers), "scaling.num_workers=3", "tracking.run_name=many"]) == 2
    assert "scaling.num_workers" in capsys.readouterr().err


def test_a_job_sent_again_waits_for_a_node_that_has_yet_to_join(
    on_cluster: None, cluster: Cluster, two_workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = load_experiment(str(two_workers), ["scaling.num_workers=3"])
    ray.init(address=cluster.address, logging_level="ERROR")
    with pytest.raises(ConfigError, match="3 workers need 3 CPUs together, the cluster has 2"):
        check_resources(three)
    monkeypatch.setenv(RESUBMITTED, "1")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(check_resources, three)
        joined = cluster.add_node(num_cpus=1)
        waiting.result()
    cluster.remove_node(joined)
