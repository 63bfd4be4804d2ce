"""A run on a real two-node cluster that can be hurt, and what must be true of it afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from ray.cluster_utils import Cluster

from orchestrator.datasets.build import build_dataset
from orchestrator.ray_support.spare_processes import importing
from orchestrator.training import PRELOAD
from tests.oracles.sample_plan import epoch_order
from tests.s3_peer import faulty, free_port, s3_peer
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.loading.ledger import read_ledger
from workloads.data.store.manifest import open_dataset

__all__ = ["faulty", "s3_peer"]  # fixtures of the object store

STEPS, BATCH, IMAGES = 24, 8, 50

EXPERIMENT = f"""
name: chaos
steps: {STEPS}
global_batch_size: {BATCH}
log_every: 1
checkpoint_every: 4
checkpoint_epochs: null
channels_last: false
data: {{decode_size: 64, decode_threads: 1, io_threads: 2}}
views: {{full_size: 64, crop_size: 32, crops_per_image: 2}}
backbone: {{norm: group}}
objective: {{kind: anchor_ntxent, levels: [P3], projection_dim: 16, projector_hidden: 16, crop_stages: [C2]}}
optimizer: {{kind: sgd, lr: 0.01}}
scaling: {{num_workers: 2, cpus_per_worker: 1, poll_interval_s: 0.2, placement: SPREAD, start_timeout_s: 20}}
tracking: {{system_metrics: false, log_model: false, run_name: hurt}}
failure: {{retries: 3, patience_s: 120}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only `make chaos` and CI's short form ask for these."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.timeout(600))


def build_images(root: Path, *, broken: tuple[int, ...] = ()) -> str:
    """A dataset of 50 images in three shards, some of which no longer decode; its URI."""
    from workloads.data.build import rows

    rng = np.random.default_rng(0)
    (root / "source").mkdir(parents=True)
    for index in range(IMAGES):
        quarters = [np.kron(rng.integers(0, 255, (48 // g, 48 // g, 3)), np.ones((g, g, 1))) for g in (2, 4, 8, 16)]
        pixels = np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)], 0)
        path = root / "source" / f"{index:03d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:-800])
    source = FolderSourceConfig(inputs=(str(root / "source"),))
    build = BuildConfig(source=source, output=str(root / "shards"), rows_per_shard=20, row_group_bytes=20_000)
    with pytest.MonkeyPatch.context() as patch:
        if broken:  # rows that were sound when they were built
            patch.setattr(rows, "decode_image", lambda data: torch.zeros(3, 96, 96, dtype=torch.uint8))
        build_dataset(build)
    return str(root / "shards")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 50 images in three shards."""
    return build_images(tmp_path_factory.mktemp("images"))


class Nodes:
    """A Ray cluster of two nodes with two CPUs each; node 0 is the head, where drivers run."""

    def __init__(self) -> None:
        os.environ.update(importing(PRELOAD))  # raylets inherit it, as they do from who starts a cluster
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self._others = [self._cluster.add_node(num_cpus=2)]
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def join(self) -> None:
        """One more node."""
        self._others.append(self._cluster.add_node(num_cpus=2))

    def kill_other(self) -> None:
        """SIGKILL the second node's raylet and its workers."""
        self._kill(self._others.pop(0))

    def drain_other(self, *, deadline_s: int) -> None:
        """Tell the cluster that the second node will be taken, as a spot market does."""
        node = self._others[0]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        notice = ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run([*command, *notice, *deadline], check=True, capture_output=True)

    def kill_head(self) -> None:
        """SIGKILL the head's processes, GCS included."""
        self._kill(self._cluster.head_node)

    def _kill(self, node: Any) -> None:
        raylets = [info.process.pid for infos in node.all_processes.values() for info in infos]
        children = [child for pid in raylets if psutil.pid_exists(pid) for child in psutil.Process(pid).children(True)]
        for pid in [*raylets, *(child.pid for child in children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        ray.shutdown()
        with contextlib.suppress(Exception):
            self._cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Two nodes of this test's own."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Nodes()
    yield cluster
    cluster.close()


@dataclass
class Driver:
    """`orchestrator train`, as a process of its own."""

    folder: Path
    nodes: Nodes | None
    overrides: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str] | None" = None

    def start(self, *more: str) -> "Driver":
        experiment = self.folder / "chaos.yaml"
        experiment.write_text(EXPERIMENT)
        command = [sys.executable, "-m", "orchestrator", "train", str(experiment), *self.overrides, *more]
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        if self.nodes is not None:
            environment["RAY_ADDRESS"] = self.nodes.address
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, text=True, env={**environment, **self.environment}
            )
        return self

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout_s: float = 300.0) -> int:
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the driver did not end:\n{self.text[-3000:]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def journals(folder: Path) -> list[Path]:
    """Journals of the run, wherever they are."""
    return [path for root in (folder / "runs", folder / "tmp") for path in root.rglob("journal.jsonl")]


def newest_step(folder: Path) -> int:
    """The newest step that the run has a loss of."""
    steps = [0]
    for path in journals(folder):
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:  # a run on S3 removes its journal from the temporary folder when it ends
            continue
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["kind"] == "metrics" and "train/loss" in record["metrics"]:
                    steps.append(record["step"])
    return max(steps)


def wait_until(condition: Callable[[], bool], what: str, driver: Driver, timeout_s: float = 120.0) -> None:
    """Poll until `condition`; a driver that ends before is a failure."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if driver.process is not None and driver.process.poll() is not None:
            pytest.fail(f"the driver ended before {what}:\n{driver.text[-3000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what}\n{driver.text[-3000:]}")
        time.sleep(0.02)


def wait_step(driver: Driver, step: int) -> None:
    """Wait until the run has a loss of `step`."""
    wait_until(lambda: newest_step(driver.folder) >= step, f"step {step}", driver)


def train_workers() -> list[psutil.Process]:
    """The processes that train now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(part.startswith("ray::RayTrainWorker") for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def losses(folder: Path, uri: str | None = None) -> list[tuple[int, float]]:
    """(step, loss) of the one MLflow run, in the order of the store."""
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder}/runs/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1, [run.info.run_name for run in runs]
    return [(point.step, point.value) for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]


def status(folder: Path, uri: str | None = None) -> tuple[str, dict[str, float], dict[str, str]]:
    """Status, metrics and tags of the one MLflow run."""
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder}/runs/mlflow.db")
    run = client.search_runs([e.experiment_id for e in client.search_experiments()])[0]
    return run.info.status, run.data.metrics, run.data.tags


@pytest.fixture(scope="session")
def undisturbed(images: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, float]]:
    """Number of workers → step → loss of runs that nobody hurt."""
    found = {}
    for workers in (1, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed-{workers}")
        driver = driver_of(folder, images, None, f"scaling.num_workers={workers}").start()
        assert driver.wait() == 0, driver.text
        found[workers] = dict(losses(folder))
        assert sorted(found[workers]) == list(range(1, STEPS + 1))
    return found


def driver_of(folder: Path, images: str, nodes: Nodes | None, *overrides: str, **environment: str) -> Driver:
    """A driver whose output, ledger and journal lie below `folder`."""
    given = [f"data.uri={images}", f"storage.path={folder}/runs", f"ledger={folder}/ledger"]
    keys = {override.split("=")[0] for override in overrides}
    given = [item for item in given if item.split("=")[0] not in keys]
    (folder / "tmp").mkdir(exist_ok=True)
    return Driver(
        folder, nodes, [*given, *overrides], {"TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": "/tmp", **environment}
    )


def assert_nothing_lost(
    folder: Path,
    images: str,
    reference: dict[int, float],
    *,
    uri: str | None = None,
    bit_equal: bool = False,
    undecodable: frozenset[str] = frozenset(),
) -> None:
    """Every loss once, in order and as undisturbed; every image once an epoch, the remainder excepted."""
    history = losses(folder, uri)
    assert [step for step, _ in history] == list(range(1, STEPS + 1))
    for step, loss in history:
        assert loss == (reference[step] if bit_equal else pytest.approx(reference[step], rel=1e-4)), f"step {step}"
    assert_ledger(folder, images, undecodable)


def assert_ledger(folder: Path, images: str, undecodable: frozenset[str]) -> None:
    dataset = open_dataset(images)
    rows = [int(n) for n in dataset.row_groups.rows]
    per_epoch = IMAGES // BATCH
    seen: dict[int, list[tuple[str, int]]] = {}
    bad: dict[int, set[str]] = {}
    for line in read_ledger(folder / "ledger"):
        seen.setdefault(line["epoch"], []).extend((i, p) for i, p in line["trained"] + line["undecodable"])  # type: ignore
        bad.setdefault(line["epoch"], set()).update(i for i, _ in line["undecodable"])  # type: ignore
    assert sorted(seen) == list(range(STEPS // per_epoch))
    for epoch, trained in seen.items():
        counts = Counter(image for image, _ in trained)
        assert max(counts.values()) == 1, f"epoch {epoch}: trained twice: {counts.most_common(2)}"
        assert sorted(position for _, position in trained) == list(range(per_epoch * BATCH))
        order = epoch_order(rows, dataset_sha256=dataset.manifest.sha256, seed=0, lanes=BATCH, epoch=epoch)
        ids = dataset_ids(images)
        assert {p: i for i, p in trained} == {p: ids[row] for p, row in enumerate(order[: per_epoch * BATCH])}
        remainder = {ids[row] for row in order[per_epoch * BATCH :]}
        assert set(counts) | remainder == set(ids.values()) and not set(counts) & remainder
        assert bad[epoch] == undecodable - remainder


def dataset_ids(images: str) -> dict[tuple[int, int], str]:
    """(row group, row in it) → image id, read with plain pyarrow."""
    import pyarrow.parquet as pq

    found: dict[tuple[int, int], str] = {}
    group = 0
    for shard in sorted(Path(images).glob("shard-*.parquet")):
        file = pq.ParquetFile(shard)
        for index in range(file.num_row_groups):
            for row, image in enumerate(file.read_row_group(index, columns=["image_id"])["image_id"].to_pylist()):
                found[group, row] = image
            group += 1
    return found


def assert_nothing_left(nodes: Nodes | None, timeout_s: float = 15.0) -> None:
    """No worker process and no placement group survives the run."""
    deadline = time.monotonic() + timeout_s
    while train_workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not train_workers()
    if nodes is None:
        return
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        groups = ray.util.placement_group_table()
        assert {group["state"] for group in groups.values()} <= {"REMOVED"}
    finally:
        ray.shutdown()


@dataclass
class TrackingServer:
    """A real MLflow server that can be killed and started again."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "TrackingServer":
        import urllib.request

        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        artifacts = ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            # Without its job runners, nine processes that nothing here asks for.
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(
                [*command, *store, *artifacts], stdout=log, stderr=log, start_new_session=True, env=environment
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return self
            time.sleep(0.2)
        pytest.fail((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[TrackingServer]:
    """A running MLflow server."""
    server = TrackingServer(tmp_path / "mlflow").start()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.kill()
