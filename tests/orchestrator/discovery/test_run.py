"""`orchestrator discover` on Ray Data's actors: killed in the middle and given again, every image once; the record in MLflow."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from orchestrator.cli.app import run
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset

COMMON = (
    "trunk.kind=vit",
    "trunk.vit.depth=2",
    "part_size=2",
    "batch_size=2",
    "gallery=2",
    "decode_threads=1",
    "scaling.cpus_per_worker=1",
)


def mlflow_runs(database: Path) -> list[object]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray of this process, started by the first discovery that needs it."""
    environment = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


def parts_in(output: Path) -> list[Path]:
    return list(output.glob("_parts/*/part-*.parquet"))


@pytest.mark.chaos
@pytest.mark.short
def test_killed_then_terminated_then_completed(
    coco: dict[str, str], tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "found"
    arguments = ["discover", f"uri={coco['train']}", f"output={output}", "methods=[lost, centre]", *COMMON]
    process = subprocess.Popen([sys.executable, "-m", "orchestrator", *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(done := parts_in(output)) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in children:  # Ray's own processes, which would end a little later by themselves
        if child.is_running():
            child.kill()
    finished = {path.name: path.stat().st_mtime_ns for path in parts_in(output)}
    assert done and len(finished) < 8 and not (output / "figures.json").exists()

    process = subprocess.Popen([sys.executable, "-m", "orchestrator", *arguments], stderr=subprocess.PIPE, text=True)
    while len(parts_in(output)) == len(finished) and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1, said
    assert re.search(r"stopped on request \(SIGTERM\) with \d+ of 8 parts missing", " ".join(said.split()))
    (stopped,) = mlflow_runs(tmp_path / "runs" / "mlflow.db")
    assert stopped.info.status == "KILLED" and not (output / "figures.json").exists()

    assert run([*arguments, "scaling.num_workers=2"]) == 0
    shown = capsys.readouterr().out
    assert "CorLoc" in shown and "eval/corloc" in shown.splitlines()[-1]
    table = pq.read_table(output / "lost" / "boxes.parquet")
    assert sorted(table["image_id"].to_pylist()) == sorted(read_annotations(open_dataset(coco["train"])))
    record = json.loads((output / "figures.json").read_text())
    assert record["figures"]["discover/images"] == 16

    runs = mlflow_runs(tmp_path / "runs" / "mlflow.db")
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert runs[0].data.metrics["eval/corloc"] == record["figures"]["eval/corloc"]
    assert runs[0].data.params["methods"] == '["lost", "centre"]'
    assert not [v for v in (*runs[0].data.params.values(), *runs[0].data.tags.values()) if str(tmp_path) in v]
    artifacts = Path(runs[0].info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "gallery" / "boxes.png").is_file()

    assert run(arguments) == 0  # finished: only read again
    assert len(mlflow_runs(tmp_path / "runs" / "mlflow.db")) == 1


def test_a_fault_in_an_actor_is_one_sentence(
    coco: dict[str, str], tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(coco["train"], tmp_path / "shards")
    (shard,) = (tmp_path / "shards").glob("shard-*.parquet")
    data = bytearray(shard.read_bytes())
    data[1000:2000] = bytes(1000)
    shard.write_bytes(data)
    arguments = ["discover", f"uri={tmp_path}/shards", f"output={tmp_path}/runs/found", "methods=[centre]", *COMMON]
    assert run(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(shard) in said and "Traceback" not in said
    assert re.search(r"; \d of 8 parts are missing; the same command continues$", said.strip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=[lost]"], "uri: name the dataset"),
        (["uri=nowhere", "methods=[centre]"], "holds no manifest.json"),
        (["uri=nowhere"], "trunk.kind: needed by these methods"),
        (["uri=nowhere", "methods=[lots]"], "methods"),
        (["a.yaml", "b.yaml", "uri=x"], "b.yaml: expected key=value"),
        (["uri=nowhere", "scaling.workers=2"], "unknown key scaling.workers"),
    ],
)
def test_a_wrong_request_starts_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("methods: [lost]")
    assert run(["discover", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("_parts"))
