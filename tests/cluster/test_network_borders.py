"""Machines with addresses and links of their own: head, worker, object store and client, each in its network namespace.

Nothing of one is on another's loopback, and a link can be cut and mended while a run goes on.
"""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import swift
from orchestrator.demo.scenes import write_scenes
from orchestrator.ray_support.spare_processes import importing
from orchestrator.training import PRELOAD
from tests.s3_peer import made_environment

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(900)]

ADDRESSES = {"head": "10.77.0.1", "worker": "10.77.0.2", "store": "10.77.0.3", "client": "10.77.0.4"}
STEPS = 400

EXPERIMENT = f"""
name: borders
steps: {STEPS}
global_batch_size: 8
log_every: 1
checkpoint_every: 20
checkpoint_epochs: null
channels_last: false
data: {{uri: "s3://images/shards", decode_size: 64, decode_threads: 1}}
views: {{full_size: 64, crop_size: 32, crops_per_image: 2}}
backbone: {{norm: group}}
objective: {{kind: anchor_ntxent, levels: [P3], projection_dim: 16, projector_hidden: 16, crop_stages: [C2]}}
optimizer: {{kind: sgd, lr: 0.01}}
evaluation: {{uri: null}}
storage: {{path: "s3://images/runs"}}
scaling: {{num_workers: 1, cpus_per_worker: 1, start_timeout_s: 30}}
tracking: {{system_metrics: false, log_model: false, run_name: borders}}
failure: {{patience_s: 300}}
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Machines:
    """Four of them at one switch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"o{secrets.token_hex(2)}"
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.token = str(token)
        self.secret = secrets.token_hex(16)
        ip("netns", "add", self.name("switch"))
        ip("-n", self.name("switch"), "link", "add", "bridge", "type", "bridge")
        ip("-n", self.name("switch"), "link", "set", "bridge", "up")
        for machine, address in ADDRESSES.items():
            there = self.name(machine)
            ip("netns", "add", there)
            end = ("type", "veth", "peer", "name", machine, "netns", self.name("switch"))
            ip("link", "add", "eth0", "netns", there, *end)
            ip("-n", self.name("switch"), "link", "set", machine, "master", "bridge", "up")
            ip("-n", there, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", there, "link", "set", link, "up")

    def name(self, machine: str) -> str:
        return f"{self.prefix}-{machine}"

    def link(self, machine: str, state: str) -> None:
        """Pull out the machine's plug (`down`), or put it in again (`up`)."""
        ip("-n", self.name("switch"), "link", "set", machine, state)

    def environment(self, *, with_keys: bool = False) -> dict[str, str]:
        foreign = ("RAY_", "MLFLOW_", "AWS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        keys = {
            "AWS_ENDPOINT_URL": f"http://{ADDRESSES['store']}:9000",
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": f"http://{ADDRESSES['head']}:5000",
        }
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **importing(PRELOAD),
            "RAY_worker_niceness": "0",
            **(keys if with_keys else {}),
        }

    def command(self, machine: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name(machine), *command]

    def start(
        self, machine: str, *command: str, more: dict[str, str] | None = None, log: str
    ) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(
                self.command(machine, *command),
                stdout=output,
                stderr=output,
                env={**self.environment(), **(more or {})},
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def keep(self, machine: str, *command: str, log: str) -> None:
        """Start it again whenever it ends, as a machine's service manager does."""

        def watch() -> None:
            while not self.stopping:
                self.start(machine, *command, log=log).wait()
                time.sleep(1.0)

        threading.Thread(target=watch, daemon=True).start()

    def run(self, machine: str, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(machine, *command),
            capture_output=True,
            text=True,
            timeout=300,
            env=self.environment(with_keys=True),
        )

    def until(self, machine: str, url: str) -> None:
        probe = f"import urllib.request as r; r.urlopen({url!r}, timeout=2)"
        deadline = time.monotonic() + 90
        while self.run(machine, sys.executable, "-S", "-c", probe).returncode != 0:
            assert time.monotonic() < deadline, f"{url} does not answer {machine}"
            time.sleep(0.5)

    def close(self) -> None:
        self.stopping = True
        for machine in (*ADDRESSES, "switch"):
            found = subprocess.run(["ip", "netns", "pids", self.name(machine)], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(psutil.Error):
                    psutil.Process(int(pid)).kill()
        for process in self.running:
            process.wait(10)
        for machine in (*ADDRESSES, "switch"):
            subprocess.run(["ip", "netns", "del", self.name(machine)], capture_output=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    try:
        made = Machines(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        pytest.skip(f"network namespaces cannot be made here (they need root and iproute2): {why}")
    try:
        bring_up(made)
        yield made
    finally:
        made.close()


def bring_up(made: Machines) -> None:
    head, store = ADDRESSES["head"], ADDRESSES["store"]
    (made.folder / "s3").mkdir()
    commands = swift.configure(
        made.folder / "s3",
        made_environment(swift.home(), *swift.REQUIREMENTS),
        ports={"proxy": 9000, "account": 9001, "container": 9002, "object": 9003},
        access_key="test:tester",
        secret_key=made.secret,
        host=store,
    )
    for kind, command in commands.items():
        made.start("store", *command, more=swift.server_environment(), log=f"s3-{kind}")
    ray = (str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats")
    scratch = f"/tmp/{made.prefix}"
    made.start(
        "head",
        *(*ray, "--head", f"--node-ip-address={head}", "--port=6379", f"--dashboard-host={head}", "--num-cpus=0"),
        f"--temp-dir={scratch}-head",
        log="head",
    )
    made.start(
        "head",
        *(sys.executable, "-m", "mlflow", "server", "--host", head, "--port", "5000", "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{made.folder}/mlflow.db", "--allowed-hosts", f"{head}:*"),
        *("--artifacts-destination", str(made.folder / "artifacts")),
        log="mlflow",
    )
    made.until("client", f"http://{store}:9000/healthcheck")
    made.until("client", f"http://{head}:5000/health")
    made.keep(
        "worker",
        *(*ray, f"--address={head}:6379", f"--node-ip-address={ADDRESSES['worker']}", "--num-cpus=1"),
        f"--temp-dir={scratch}-worker",
        log="worker",
    )
    made.until("client", f"http://{head}:8265/api/authentication_mode")
    write_scenes(made.folder / "pictures", split="train", count=40, side=96)
    bucket = "import boto3; boto3.client('s3').create_bucket(Bucket='images')"
    assert made.run("client", sys.executable, "-c", bucket).returncode == 0
    build = ["data", "build", "--source", "folder", "--input", str(made.folder / "pictures")]
    done = made.run("client", sys.executable, "-m", "orchestrator", *build, "--output", "s3://images/shards")
    assert done.returncode == 0, done.stderr


HISTORY = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
found = client.search_runs([e.experiment_id for e in client.search_experiments()])
runs = {run.info.run_name: run for run in found}
run = runs[sys.argv[1]]
steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
print(json.dumps({"status": run.info.status, "steps": steps, "metrics": run.data.metrics}))
"""


def test_a_run_from_elsewhere_survives_a_link_that_is_cut_for_moments_and_for_longer(machines: Machines):
    (machines.folder / "borders.yaml").write_text(EXPERIMENT)
    address = f"http://{ADDRESSES['head']}:8265"
    submit = ["-m", "orchestrator", "submit", str(machines.folder / "borders.yaml"), "--address", address]
    client = subprocess.Popen(
        machines.command("client", sys.executable, *submit),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=machines.environment(with_keys=True),
    )
    assert client.stdout is not None
    said, cuts = "", {40: 4.0, 160: 45.0}  # at which step, and for how many seconds
    for line in client.stdout:
        said += line
        reached = re.match(r"step (\d+)/", line)
        for step in [step for step in cuts if reached and int(reached[1]) >= step]:
            machines.link("worker", "down")
            time.sleep(cuts.pop(step))
            machines.link("worker", "up")
    assert client.wait(30) == 0, said
    assert not cuts, said
    told: dict[str, Any] = json.loads(machines.run("client", sys.executable, "-c", HISTORY, "borders").stdout)
    assert told["status"] == "FINISHED"
    assert told["steps"] == list(range(1, STEPS + 1)), "a step is missing, or was counted twice"
    assert any(key.startswith("fault/") for key in told["metrics"]), said  # the longer cut cost the node
