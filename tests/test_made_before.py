"""What users made with commit e1283fa still loads, and gives what it gave then.

`fixtures/e1283fa/make.py` made the files with that commit's code, and `expected.json` with the `look_at_…` functions below. A
test that fails here says that somebody's experiment, data, run or model is lost to them; see README.md.
"""

import contextlib
import io
import json
import math
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.cli.app import run as run_orchestrator
from orchestrator.datasets.build import build_dataset
from orchestrator.datasets.verify import verify_dataset
from orchestrator.discovery.spec import load_discovery
from orchestrator.experiments.load import load_experiment, load_sweep
from orchestrator.experiments.spec import StorageConfig, TrainExperiment
from orchestrator.runs.identity import begun_run, claim_run, finished_run, run_name
from orchestrator.runs.journal_access import read_records
from orchestrator.runs.records import to_json
from orchestrator.sweeps.checks import listed_points
from orchestrator.sweeps.run import sweep_name
from orchestrator.sweeps.stages import search_stage
from workloads.__main__ import main as run_workloads
from workloads.config import build, config_hash, read_yaml
from workloads.data.build.shards import BuildConfig
from workloads.data.loading.loaders import TrainLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset
from workloads.models.backbone import imagenet_normalized
from workloads.models.trunks import CheckpointTrunkConfig, load_resnet
from workloads.serving.predict import Predictor
from workloads.spec.loading import load_model
from workloads.storage.checkpoint import read_checkpoint, read_meta

HERE = Path(__file__).resolve().parent / "fixtures" / "e1283fa"

# Loads a logged model as somebody does who has MLflow and not this project. Nothing in it names our packages, because those that
# the model brings keep the names that they had.
ALONE = """
import inspect, sys
import mlflow, numpy as np
folder, given, found = sys.argv[1:]
loaded = mlflow.pyfunc.load_model(folder)
result = loaded.predict({"images": np.load(given)})
code = inspect.getfile(type(loaded.unwrap_python_model().predictor))
assert code.startswith(folder), f"{code} is not the model's own"
np.savez(found, **result)
"""


def ramps(count: int = 2, side: int = 64) -> np.ndarray:
    """float32 (count, 3, side, side) in [0, 1): pixel (n, c, y, x) is ((37 n + 11 c + 3 y + 5 x) mod 64) / 64."""
    n, c, y, x = np.ogrid[0:count, 0:3, 0:side, 0:side]
    return (((37 * n + 11 * c + 3 * y + 5 * x) % 64) / 64).astype(np.float32)


def summary(values: Any) -> dict[str, Any]:
    """A few numbers that tell arrays apart."""
    flat = np.asarray(values, dtype=np.float64)
    picked = flat.ravel()[[0, flat.size // 3, flat.size // 2, -1]]
    return {"shape": list(flat.shape), "mean": flat.mean(), "std": flat.std(), "some": picked.tolist()}


def unpack(name: str, target: Path) -> Path:
    """The folder that `name`.tar.xz holds, as `target`."""
    with tarfile.open(HERE / f"{name}.tar.xz") as tar:
        tar.extractall(target, filter="data")
    return target


def look_at_experiments() -> dict[str, Any]:
    """The hashes and names by which runs of the YAML files are known, and the points that their sweep tries."""
    pretraining = load_experiment(str(HERE / "experiment.yaml"), loop="pretrain")
    changed = ["objective.temperature=0.2", "objective.kind=ntxent", "views.kind=pair", "scaling.num_workers=2"]
    sweep = load_sweep(str(HERE / "sweep.yaml"))
    points = listed_points(sweep)
    assert points is not None
    stage = search_stage(sweep, name=sweep_name(sweep), parent=None)
    finetuning = load_experiment(str(HERE / "finetune.yaml"), loop="finetune")
    discovery = load_discovery([str(HERE / "discover.yaml")])
    return {
        "experiment": {"run_name": run_name(pretraining), "config_sha256": config_hash(pretraining.science)},
        "experiment, overridden": run_name(load_experiment(str(HERE / "experiment.yaml"), changed)),
        "finetune": {"run_name": run_name(finetuning), "config_sha256": config_hash(finetuning.science)},
        "sweep": {
            "name": sweep_name(sweep),
            "points": points,
            "trials": [run_name(stage.experiment(point)) for point in points],
        },
        "discover": {"config_sha256": config_hash(discovery.science), "output": discovery.output},
    }


def look_at_shards(uri: str) -> dict[str, Any]:
    """The dataset's identity, its rows, and the first epoch as a run would read it."""
    dataset = open_dataset(uri)
    plan = SamplePlan(
        dataset.row_groups.rows, dataset_sha256=dataset.manifest.sha256, seed=7, global_batch_size=4, lanes=None
    )
    reading = DataConfig(uri=uri, decode_size=32, io_threads=1, decode_threads=1)
    batches = TrainLoader(dataset, plan, reading, regions="grid").iterate()
    epoch = [next(batches) for _ in range(plan.steps_per_epoch)]
    batches.close()  # type: ignore[attr-defined]
    rejects = pq.read_table(Path(uri, dataset.manifest.rejects.name)).to_pylist()
    return {
        "manifest_sha256": dataset.manifest.sha256,
        "build": dict(dataset.manifest.build),
        "row_groups": dataset.row_groups.rows.tolist(),
        "rejects": rejects,
        "rows": {
            image_id: {
                "size_hw": list(found.size_hw),
                "boxes_xyxy": found.boxes_xyxy.tolist(),
                "categories": list(found.categories),
                "crowd": found.crowd.tolist(),
            }
            for image_id, found in read_annotations(dataset).items()
        },
        "epoch": [list(batch.image_ids) for batch in epoch],
        "pixels": [summary(batch.images) for batch in epoch],
        "regions": [np.unique(batch.regions, return_counts=True)[1].tolist() for batch in epoch],
        "verified": str(verify_dataset(uri)),
    }


def look_at_checkpoint(folder: Path) -> dict[str, Any]:
    """The metadata of a pretraining run's checkpoint, and the features that its networks compute from `ramps()`."""
    model, settings = load_model(folder)
    images = torch.from_numpy(ramps())
    trunk = load_resnet(CheckpointTrunkConfig(uri=str(folder)))
    with torch.inference_mode():
        stages = trunk(imagenet_normalized(images))
        levels = model.embed_grid(images)
        crops = model.embed_crops(images[:, :, :32, :32])
    meta = read_meta(str(folder))
    return {
        "meta": asdict(meta) | {"metrics": dict(meta.metrics)},
        "config_sha256": config_hash(settings),
        "stages": {stage: summary(value) for stage, value in stages.items()},
        "levels": {level: summary(value) for level, value in levels.items()},
        "crops": summary(crops),
    }


def look_at_continued(output: Path) -> dict[str, Any]:
    """The second step of the run whose first `checkpoint.tar.xz` holds: its record, and how far it moved the weights."""
    before = read_checkpoint(str(output / "checkpoints" / "step_00000001")).state
    given = ["data.uri=shards", "evaluation.uri=shards", "--output", str(output)]
    with contextlib.chdir(HERE), contextlib.redirect_stdout(io.StringIO()):
        assert run_workloads(["train", "experiment.yaml", *given]) == 0
    found = read_checkpoint(str(output / "checkpoints" / "step_00000002"))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = next(record for record in records if "train/loss" in record)
    measured = next(record for record in records if "eval/sga" in record)
    name = "trunk.body.layer1.0.conv1.weight"
    return {
        "state": sorted(before),
        "train/loss": trained["train/loss"],
        "train/lr": trained["train/lr"],
        "figures": {key: True for key in measured if key.startswith("eval/")},
        "eval/chance": measured["eval/chance"],
        "moved, in learning rates": summary((found.state["model"][name] - before["model"][name]) / trained["train/lr"]),
        "of the checkpoint": {key: True for key in found.meta.metrics},
        "config_sha256": found.meta.config_sha256,
        "manifest_sha256": found.meta.manifest_sha256,
    }


def look_at_detector(folder: Path) -> dict[str, Any]:
    """What a fine-tuned detector finds; many of its boxes score the same, so that only the best scores are told."""
    predictor = Predictor(folder)
    found: Any = predictor.predict(ramps())
    return {
        "categories": list(predictor.module.categories),
        "boxes": [len(item["boxes_xyxy"]) for item in found],
        "best": [np.sort(item["scores"])[-3:].tolist() for item in found],
        "kinds": sorted({name for item in found for name in item["categories"]}),
    }


class Alone:
    """The logged model in `folder`, asked about `ramps()` in a process where this project is not; it works while others do."""

    def __init__(self, folder: Path, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self.folder, self._found = folder, work / "found.npz"
        np.save(work / "given.npy", ramps())
        command = [sys.executable, "-I", "-c", ALONE, str(folder), str(work / "given.npy"), str(self._found)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=work)

    def result(self) -> dict[str, np.ndarray]:
        """What `predict` returned there."""
        _, said = self._process.communicate(timeout=200)
        assert self._process.returncode == 0, said[-3000:]
        return dict(np.load(self._found))

    def stop(self) -> None:
        """End the process if nobody has waited for it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def look_at_model(alone: Alone) -> dict[str, Any]:
    """What the logged model gives by itself, and that our own reader makes the same of its weights."""
    predictor = Predictor(alone.folder / "artifacts" / "checkpoint")
    ours: Any = predictor.predict(ramps())
    file: Any = predictor.predict([(HERE / "source" / "images" / "000000000001.png").read_bytes()])
    theirs = alone.result()
    assert theirs.keys() == ours.keys()
    for level, value in ours.items():
        np.testing.assert_allclose(theirs[level], value, rtol=1e-3, atol=1e-4)
    return {
        "ramps": {level: summary(value) for level, value in theirs.items()},
        "an image's file": {level: summary(value) for level, value in file.items()},
    }


class Store:
    """The runs folder of `orchestrator train`, unpacked elsewhere, with its logged model in place."""

    def __init__(self, target: Path, model: Path) -> None:
        self.folder = unpack("store", target)
        self.uri = f"sqlite:///{target}/mlflow.db"
        (record,) = target.glob("*/run.json")
        self.name = record.parent.name
        with contextlib.closing(sqlite3.connect(target / "mlflow.db")) as database, database:
            ((root,),) = database.execute("SELECT artifact_location FROM experiments WHERE name = 'street'")
            here = (target / "mlartifacts").as_uri()
            for table, column in (
                ("experiments", "artifact_location"),
                ("runs", "artifact_uri"),
                ("logged_models", "artifact_location"),
            ):
                database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (root, here))
            ((place,),) = database.execute("SELECT artifact_location FROM logged_models")
        shutil.copytree(model, place.removeprefix("file://"))

    def command(self, *arguments: str) -> str:
        """What `orchestrator` prints when it is asked about this store."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run_orchestrator([*arguments, "--tracking-uri", self.uri]) == 0
        return printed.getvalue()


def look_at_store(store: Store, work: Path) -> dict[str, Any]:
    """A finished run: under which name it is known, what its record holds, and what commands say of it."""
    (config,) = store.folder.glob("mlartifacts/*/artifacts/config/experiment.yaml")
    logged = build(TrainExperiment, read_yaml(config))
    experiment = replace(logged, storage=StorageConfig(path=str(store.folder)))
    run = begun_run(experiment)
    assert run is not None and claim_run(experiment, manifest_sha256=run.manifest_sha256) == run
    figures = store.command(
        *("evaluate", store.name, "--data", str(HERE / "shards")),
        *("evaluation.protocol.untrained_networks=0", "evaluation.limit=4"),
    )
    files = store.command("export", store.name, "--format", "safetensors", "--output", str(work / "exported"))
    status = store.command("status", store.name).splitlines()
    return {
        "run": {"name": run_name(experiment), "claim": run.claim, "config_sha256": run.config_sha256},
        "finished": finished_run(run),
        "records": [[record["kind"], record.get("step")] for record in map(to_json, read_records(experiment))],
        "figures": {line.split()[0]: True for line in figures.splitlines()[:-1]},
        "files": sorted(line.split()[0] for line in files.splitlines()),
        "status": [line for line in status if line.startswith(("status", "step", "score"))],
    }


def look_at_everything(work: Path) -> dict[str, Any]:
    """All that `expected.json` holds."""
    run = unpack("checkpoint", work / "run")
    model = unpack("mlflow_model", work / "model")
    alone = Alone(model, work / "alone")
    return {
        "input": ramps.__doc__,
        "pyarrow": pyarrow.__version__,
        "experiments": look_at_experiments(),
        "shards": look_at_shards(str(HERE / "shards")),
        "checkpoint": look_at_checkpoint(run / "checkpoints" / "step_00000001"),
        "continued": look_at_continued(run),
        "detector": look_at_detector(unpack("detector", work / "detector")),
        "model": look_at_model(alone),
        "store": look_at_store(Store(work / "store", model), work),
    }


def agree(seen: Any, expected: Any, where: str = "") -> None:
    """See that `seen` has all that is expected, numbers to within what another machine's rounding may change."""
    if isinstance(expected, dict):  # what is told beside it is no loss
        assert seen.keys() >= expected.keys(), f"{where}: {sorted(expected.keys() - seen.keys())} are missing"
        for key, value in expected.items():
            agree(seen[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(seen) == len(expected), where
        for i, value in enumerate(expected):
            agree(seen[i], value, f"{where}/{i}")
    elif isinstance(expected, float):
        assert math.isclose(seen, expected, rel_tol=2e-3, abs_tol=2e-4), f"{where}: {seen}, not {expected}"
    else:
        assert seen == expected, f"{where}: {seen}, not {expected}"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((HERE / "expected.json").read_text())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output folder of a run that was stopped after its first step."""
    folder = unpack("checkpoint", tmp_path_factory.mktemp("made") / "run")
    yield folder
    shutil.rmtree(folder)  # hundreds of megabytes


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """A logged model that is being loaded by itself from the first test on, because that takes a process's imports."""
    folder = tmp_path_factory.mktemp("alone")
    started = Alone(unpack("mlflow_model", folder / "model"), folder / "work")
    yield started
    started.stop()
    shutil.rmtree(started.folder)


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own settings decides where a store is."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_experiment_files_mean_the_same_runs(expected):
    agree(look_at_experiments(), expected["experiments"])


def test_shards_hold_the_same_rows_in_the_same_order(expected):
    agree(look_at_shards(str(HERE / "shards")), expected["shards"])


def test_a_build_given_again_knows_its_dataset(expected, tmp_path):
    """In place it finds nothing to do; elsewhere it makes the same bytes, if the same library writes them."""
    described = dict(expected["shards"]["build"])
    source = {
        "kind": "coco",
        "inputs": [str(HERE / "source/images")],
        "annotations": str(HERE / "source/instances.json"),
    }
    request = {"source": source, **described}
    shutil.copytree(HERE / "shards", tmp_path / "copy")
    again = build_dataset(build(BuildConfig, {**request, "output": str(tmp_path / "copy")}))
    assert again.sha256 == expected["shards"]["manifest_sha256"]
    names = {path.name for path in (tmp_path / "copy").iterdir()} - {".lock"}  # by which builds wait for each other
    assert names == {path.name for path in (HERE / "shards").iterdir()}
    if pyarrow.__version__ == expected["pyarrow"]:
        fresh = build_dataset(build(BuildConfig, {**request, "output": str(tmp_path / "fresh")}))
        assert fresh.sha256 == expected["shards"]["manifest_sha256"]


def test_a_checkpoint_gives_the_same_features(expected, run_folder):
    agree(look_at_checkpoint(run_folder / "checkpoints" / "step_00000001"), expected["checkpoint"])


def test_a_stopped_run_goes_on(expected, run_folder):
    agree(look_at_continued(run_folder), expected["continued"])


def test_a_detector_finds_the_same(expected, tmp_path):
    agree(look_at_detector(unpack("detector", tmp_path / "detector")), expected["detector"])
    shutil.rmtree(tmp_path / "detector")


def test_a_finished_run_is_known_evaluated_and_exported(expected, alone, tmp_path):
    store = Store(tmp_path / "store", alone.folder)
    agree(look_at_store(store, tmp_path), expected["store"])
    shutil.rmtree(store.folder)


def test_a_logged_model_gives_the_same_embeddings_without_this_project(expected, alone):
    agree(look_at_model(alone), expected["model"])


def test_a_logged_model_loads_in_a_process_that_has_imported_this_project(alone: Alone) -> None:
    """Then today's `workloads` is used, which must still be importable by the names that the model's code has."""
    import mlflow

    loaded = mlflow.pyfunc.load_model(str(alone.folder))
    expected: Any = Predictor(alone.folder / "artifacts" / "checkpoint").predict(ramps())
    result = loaded.predict({"images": ramps()})
    assert result.keys() == expected.keys()
    for level, value in expected.items():
        np.testing.assert_array_equal(result[level], value)
