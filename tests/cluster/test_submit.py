"""`orchestrator submit` against a real cluster of two nodes: the same run as here, watched, stopped, tried again; no secret in any log."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from cluster.local import LocalCluster, processes
from orchestrator.experiments.load import load_experiment
from orchestrator.launch.jobs_client import SubmitError, connect
from orchestrator.launch.submit import check_portable, job_name, without_password, working_directory
from orchestrator.ray_support import credentials
from tests.cluster.conftest import everything_written, orchestrator
from tests.orchestrator.conftest import write_experiment
from tests.s3_peer import free_port
from workloads.errors import ConfigError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """A job that a failed test left behind would take the next one's nodes."""
    yield
    if "local" in request.fixturenames:
        cluster = request.getfixturevalue("local")
        for job in ray_says(cluster, "/api/jobs/"):
            if job["status"] in ("PENDING", "RUNNING") and job["submission_id"]:
                orchestrator("submit", "stop", job["submission_id"], cluster=cluster)


PLANTED = "planted-s3cret"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, str]) -> Path:
    return write_experiment(tmp_path_factory.mktemp("submitted"), datasets, workers=2)


def job_in(text: str) -> str:
    return next(line.split()[1] for line in text.splitlines() if line.startswith("job "))


def runs_of(cluster: LocalCluster) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=cluster.tracking_uri)
    return {
        found.info.run_name: found
        for found in client.search_runs([e.experiment_id for e in client.search_experiments()])
    }


def ray_says(cluster: LocalCluster, path: str) -> Any:
    token = cluster.token_file.read_text()
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def prometheus_pages(cluster: LocalCluster) -> str:
    """What the agents of all nodes tell Prometheus."""
    text = ""
    for target in json.loads(Path(cluster.scratch, "head", "prom_metrics_service_discovery.json").read_text()):
        for address in target["targets"]:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
                text += page.read().decode()
    return text


@pytest.mark.jobs
@pytest.mark.short
def test_a_job_is_the_same_run_with_its_store_in_s3_and_no_secret_written_anywhere(
    local: LocalCluster, experiment: Path
):
    given = ["storage.path=s3://orchestrator/runs", "tracking.run_name=there", "steps=6", "evaluation.uri=null"]
    given.append("tracking.system_metrics=true")
    planted = {"AWS_UNUSED_SECRET": PLANTED, "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": PLANTED}
    done = orchestrator("submit", str(experiment), *given, cluster=local, **planted)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("run ") and "train/loss" in lines[-1]
    assert not done.stderr and "Traceback" not in done.stdout

    job = job_in(done.stdout)
    found = runs_of(local)["there"]
    assert found.info.status == "FINISHED"
    assert found.data.tags["ray.submission_id"] == job  # from the run to the job
    told = ray_says(local, f"/api/jobs/{job}")
    assert told["metadata"]["mlflow.run_name"] == "there"  # and back
    assert told["metadata"]["config.sha256"] == found.data.tags["config.sha256"]

    assert {f"node/127.0.0.{n}/cpu_percent" for n in (3, 4)} <= found.data.metrics.keys()  # each node's load

    secret = Path(local.folder, "s3-credentials").read_text().splitlines()[-1].rpartition(" ")[2]
    token = local.token_file.read_text()
    kept = {"s3-credentials", "token", "proxy.conf"}  # where they belong, for their user alone
    for path in everything_written(local):
        content = path.read_bytes()
        for what in (PLANTED, secret, token):
            assert what.encode() not in content or path.name in kept, f"{path} holds a secret"
    for what in (PLANTED, secret, token):
        assert what not in done.stdout and what not in json.dumps(told)
        assert what not in json.dumps(found.to_dictionary())


@pytest.mark.jobs
@pytest.mark.short
def test_what_is_wrong_with_the_request_is_the_jobs_answer(local: LocalCluster, experiment: Path):
    done = orchestrator("submit", str(experiment), "data.uri=/nowhere", "tracking.run_name=wrong", cluster=local)
    assert done.returncode == 2
    assert "error: /nowhere" in done.stdout and "exit code 2" in done.stderr
    jobs = orchestrator("submit", "list", cluster=local)
    assert "failed" in jobs.stdout and jobs.returncode == 0
    job = job_in(done.stdout)
    told = orchestrator("submit", "status", job, cluster=local)
    assert told.returncode == 0 and "failed" in told.stdout and "run      wrong" in told.stdout
    assert "error: /nowhere" in orchestrator("submit", "logs", job, cluster=local).stdout
    for command in ("status", "logs", "stop"):
        unknown = orchestrator("submit", command, "nobody", cluster=local)
        assert unknown.returncode == 1 and "knows no such job" in unknown.stderr


@pytest.mark.jobs
def test_a_job_is_left_with_ctrl_c_found_again_and_stopped(local: LocalCluster, experiment: Path):
    command = [sys.executable, "-m", "orchestrator", "submit", str(experiment), "steps=5000", "evaluation.uri=null"]
    environment = {**os.environ, **local.environment()}
    controller, terminal = pty.openpty()
    client = subprocess.Popen(
        [*command, "tracking.run_name=long"], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    asked = False
    with os.fdopen(controller, "r+b", buffering=0) as screen, contextlib.suppress(OSError):
        while part := screen.read(4096):
            shown += part
            if b"step " in shown and not asked:
                asked = True
                client.send_signal(signal.SIGINT)
            if b"follow it further" in part:
                screen.write(b"d\n")
    assert client.wait(30) == 0, shown.decode()
    text = shown.decode()
    assert "left running" in text and "Traceback" not in text
    job = job_in(text.replace("\r", ""))
    assert "running" in orchestrator("submit", "status", job, cluster=local).stdout
    deadline = time.monotonic() + 60  # workers tell their node's agent every ten seconds
    while "ray_orchestrator_images_per_second{" not in (pages := prometheus_pages(local)):
        assert time.monotonic() < deadline
        time.sleep(1.0)
    assert 'run="long"' in pages

    followed = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "submit", "logs", job, "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert orchestrator("submit", "stop", job, cluster=local).returncode == 0
    said, _ = followed.communicate(timeout=120)
    assert followed.returncode == 1 and "step " in said
    assert "stopped" in orchestrator("submit", "status", job, cluster=local).stdout


@pytest.mark.jobs
def test_a_driver_that_was_killed_is_submitted_again_and_goes_on(local: LocalCluster, experiment: Path):
    given = ["steps=40", "checkpoint_every=5", "evaluation.uri=null", "tracking.run_name=again"]

    def kill_once() -> None:
        store = Path(yaml.safe_load(experiment.read_text())["storage"]["path"], "again", "checkpoints")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if list(store.glob("step_*/meta.json")):
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        if "tracking.run_name" not in " ".join(process.cmdline()) and process.cmdline()[1:5] == [
                            *("-m", "orchestrator", "train", "experiment.yaml")
                        ]:
                            process.kill()
                            return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_once)
    killer.start()
    done = orchestrator("submit", str(experiment), *given, "--retries", "1", cluster=local)
    killer.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended from outside" in done.stdout and done.stdout.count("\njob ") + done.stdout.startswith("job ") == 2
    client = MlflowClient(tracking_uri=local.tracking_uri)
    found = runs_of(local)["again"]
    history = [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")]
    assert history == sorted(set(history)) and history[-1] == 40


@pytest.mark.jobs
def test_a_lost_head_is_replaced_and_the_job_submitted_to_it_again(local: LocalCluster, experiment: Path):
    given = ["steps=60", "checkpoint_every=5", "evaluation.uri=null", "tracking.run_name=headless"]

    def lose_the_head() -> None:
        store = Path(yaml.safe_load(experiment.read_text())["storage"]["path"], "headless", "checkpoints")
        deadline = time.monotonic() + 120
        while not list(store.glob("step_*/meta.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes(local):
            with contextlib.suppress(psutil.Error):
                if f"{local.scratch}/head" in " ".join(process.cmdline()):
                    process.kill()

    loser = threading.Thread(target=lose_the_head)
    loser.start()
    done = orchestrator("submit", str(experiment), *given, "--retries", "2", cluster=local, timeout_s=400.0)
    loser.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitting it again" in done.stdout
    history = MlflowClient(tracking_uri=local.tracking_uri).get_metric_history(
        runs_of(local)["headless"].info.run_id, "train/loss"
    )
    steps = [point.step for point in history]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.jobs
def test_ray_job_submit_does_the_same(local: LocalCluster, experiment: Path, tmp_path: Path):
    root = Path(__file__).parents[2]
    for package in ("orchestrator", "workloads", "cluster"):
        (tmp_path / package).symlink_to(root / package)
    (tmp_path / "experiment.yaml").write_text(experiment.read_text())
    command = [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(tmp_path), "--"),
        *("python", "-m", "orchestrator", "train", "experiment.yaml", "steps=4", "evaluation.uri=null"),
        "tracking.run_name=plain",
    ]
    # The cluster's nodes know MLflow's address; nothing of the client's environment is sent.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **local.environment()}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert runs_of(local)["plain"].info.status == "FINISHED"


@pytest.mark.jobs
@pytest.mark.short
@pytest.mark.parametrize(
    ("address", "variables", "message"),
    [
        ("http://127.0.0.1:{closed}", {}, "no Ray cluster answers there"),
        ("{mlflow}", {}, "this is not a Ray cluster's dashboard"),
        ("127.0.0.1:6379", {}, "give the dashboard's address"),
        ("{dashboard}", {"RAY_AUTH_MODE": "disabled"}, "requires a token, and none was sent"),
        ("{dashboard}", {"RAY_AUTH_TOKEN_PATH": "{wrong}"}, "it does not accept this one"),
    ],
)
def test_preflight_says_what_is_wrong(
    local: LocalCluster, experiment: Path, tmp_path: Path, address: str, variables: dict[str, str], message: str
):
    (tmp_path / "wrong").write_text("0" * 64)
    names = {
        "closed": free_port(),
        "mlflow": local.tracking_uri,
        "dashboard": local.dashboard,
        "wrong": str(tmp_path / "wrong"),
    }
    given = {name: value.format(**names) for name, value in variables.items()}
    done = orchestrator("submit", str(experiment), "--address", address.format(**names), cluster=local, **given)
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_only_this_machine_has_is_refused_before_it_is_sent(experiment: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_experiment(str(experiment), ["tracking.uri=null", "storage.path=s3://bucket/runs"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(ConfigError, match=r"tracking.uri: none is given"):
        check_portable(loaded, "http://10.0.0.5:8265")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    with pytest.raises(ConfigError, match=r"tracking.uri: http://localhost:5000 cannot be reached"):
        check_portable(loaded, "http://10.0.0.5:8265")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example")
    check_portable(loaded, "http://10.0.0.5:8265")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL: .* is this machine's loopback"):
        check_portable(loaded, "http://10.0.0.5:8265")
    check_portable(loaded, "http://127.0.0.1:8265")


def test_a_password_in_an_address_is_not_in_what_is_sent(experiment: Path):
    address = f"https://me:{PLANTED}@mlflow.example"
    loaded = load_experiment(str(experiment), [f"tracking.uri={address}"])
    packaged, variables = without_password(loaded)
    assert variables == {"MLFLOW_TRACKING_URI": address}
    visible, secret = credentials.divide(variables)
    assert not visible and secret == variables
    with working_directory(packaged, secret=secret) as folder:
        for path in [path for path in folder.rglob("*") if path.is_file() and path.name != credentials.FILE]:
            assert PLANTED.encode() not in path.read_bytes(), path
        assert load_experiment(str(folder / "experiment.yaml")).tracking.uri is None  # so the variable decides
    assert without_password(packaged) == (packaged, {})
    stored = load_experiment(str(experiment), [f"storage.path=s3://me:{PLANTED}@bucket/runs"])
    with pytest.raises(ConfigError, match=r"storage.path: its address has a password"):
        check_portable(stored, "http://127.0.0.1:8265")


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_that_is_given_wins_and_the_users_variables_stay(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(SubmitError, match=f"http://127.0.0.1:{(port := free_port())}: no Ray cluster answers"):
        connect(f"http://127.0.0.1:{port}")
    assert os.environ[name] == "http://127.0.0.1:1"


def test_names_of_jobs_are_readable_and_never_the_same(experiment: Path):
    loaded = load_experiment(str(experiment), ["tracking.run_name=a.b_c"])
    names = {job_name(loaded) for _ in range(50)}
    assert len(names) == 50 and all(name.startswith("a-b_c-") for name in names)


def test_the_working_directory_is_small_and_has_its_secrets_in_a_private_file(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = load_experiment(str(experiment), [])
    with working_directory(loaded, secret={"AWS_SECRET_ACCESS_KEY": PLANTED}) as folder:
        assert load_experiment(str(folder / "experiment.yaml")) == loaded
        kept = folder / credentials.FILE
        assert kept.stat().st_mode & 0o077 == 0
        assert json.loads(kept.read_text())["variables"] == {"AWS_SECRET_ACCESS_KEY": PLANTED}
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3 * 2**20
    assert not folder.exists()
    monkeypatch.setattr("orchestrator.launch.submit._LARGEST_MIB", 0.1)
    with pytest.raises(SubmitError, match="MiB"), working_directory(loaded, secret={}):
        pass


def test_what_travels_and_what_may_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = me\naws_secret_access_key = hidden\n")
    variables = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"),
        "AWS_ENDPOINT_URL": "https://me:word@s3.example",
        "AWS_REGION": "here",
        "MLFLOW_TRACKING_URI": "http://mlflow.example",
        "MLFLOW_TRACKING_PASSWORD": "hidden too",
        "HOME": "/home/me",
    }
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    gathered = credentials.gather(variables, s3=True)
    seen, secret = credentials.divide({**gathered, "OMP_NUM_THREADS": "2"})
    assert seen == {"AWS_REGION": "here", "MLFLOW_TRACKING_URI": "http://mlflow.example", "OMP_NUM_THREADS": "2"}
    assert secret == {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_ENDPOINT_URL": "https://me:word@s3.example",
        "MLFLOW_TRACKING_PASSWORD": "hidden too",
    }
    assert "AWS_ACCESS_KEY_ID" not in credentials.gather(variables, s3=False)
