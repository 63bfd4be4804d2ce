"""`cluster up local`: the nodes and services that it reports, closed to other users, and all of them gone after `down`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError, ClusterRequestError
from cluster.local import (
    MARK,
    LocalCluster,
    LocalOptions,
    down,
    find,
    live_nodes,
    processes,
    resources,
    states,
    up,
)
from cluster.local.state import make_scratch_folder, write_state
from tests.cluster.conftest import free_options, orchestrator

pytestmark = pytest.mark.timeout(400)


def status_of(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_is_a_cluster_of_that_many_nodes_each_at_its_own_address(local: LocalCluster):
    assert {name for name, (state, _) in states(local).items() if state == "RUNNING"} == {
        *("head", "node1", "node2", "mlflow", "s3-proxy", "s3-account", "s3-container", "s3-object")
    }
    addresses = sorted(node.address for node in live_nodes(local))
    assert addresses == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    assert resources(local)["CPU"] == 2.0  # the head takes no work
    done = orchestrator("cluster", "status", "--folder", local.folder)
    assert done.returncode == 0, done.stderr
    assert local.dashboard in done.stdout and local.tracking_uri in done.stdout and "CPU 2" in done.stdout


def test_its_secrets_are_files_that_only_its_user_reads(local: LocalCluster):
    for name in ("token", "cluster.json", "env.sh", "s3-credentials", "supervisord.conf", "s3/proxy.conf"):
        assert Path(local.folder, name).stat().st_mode & 0o077 == 0, name
    assert Path(local.folder).stat().st_mode & 0o077 == 0 or Path(local.folder).parent.stat().st_mode & 0o077 == 0
    assert Path(local.scratch).stat().st_mode & 0o077 == 0
    token = local.token_file.read_text()
    keys = Path(local.folder, "s3-credentials").read_text().splitlines()[-1].rpartition(" ")[2]
    for process in processes(local):
        command = " ".join(process.cmdline())
        assert token not in command and keys not in command


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/cluster_metadata", "/nodes?view=summary", "/logs"])
def test_the_dashboard_and_the_job_api_want_the_token(local: LocalCluster, path: str):
    token = local.token_file.read_text()
    url = local.dashboard + path
    assert status_of(url, None) == 401
    assert status_of(url, token[::-1]) == 403
    assert status_of(url, token) in (200, 404)


JOIN = """
import ray, sys
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("joined", len(ray.nodes()))
"""


@pytest.mark.parametrize("door", ["client", "gcs"])
def test_nobody_joins_without_the_token(local: LocalCluster, door: str, tmp_path: Path):
    port = local.options.client_port if door == "client" else local.options.gcs_port
    address = f"ray://127.0.0.2:{port}" if door == "client" else f"127.0.0.2:{port}"
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    foreign = ("RAY_", "MLFLOW_", "AWS_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    tried = {
        "none": {**plain, "RAY_AUTH_MODE": "disabled"},
        "wrong": {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
        "right": {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(local.token_file)},
    }
    command = [sys.executable, "-c", JOIN, address]

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=tried.pop(name)
        )

    # Alone: others that import Ray beside it take the cores that its own server wants.
    began = time.monotonic()
    said = {"right": start("right").communicate(timeout=90)[0]}
    deadline = 2 * time.monotonic() - began + 10  # the others get longer than it took, together
    for name, process in {name: start(name) for name in list(tried)}.items():
        try:
            said[name] = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
        except subprocess.TimeoutExpired:  # it keeps asking, and is not let in
            process.kill()
            said[name] = process.communicate()[0]
    assert "joined" not in said["none"] and "joined" not in said["wrong"], said
    assert "joined 3" in said["right"], said


def outward_address() -> str | None:
    """An address of this machine that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


def test_only_ray_itself_listens_beyond_loopback(local: LocalCluster):
    """What Ray does not let us choose: its own servers, which want the token, and its read-only Prometheus pages."""
    ours = {process.pid: " ".join(process.cmdline()) for process in processes(local)}
    beyond = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in ours:
            host = connection.laddr.ip.removeprefix("::ffff:")
            if not host.startswith("127."):
                beyond[connection.laddr.port] = ours[connection.pid]
    ray = ("gcs_server", "raylet", "ray::DashboardAgent", "dashboard.py", "autoscaler/_private/monitor.py")
    assert all(any(part in command for part in ray) for command in beyond.values()), beyond
    outward = outward_address()
    if outward is None:
        pytest.skip("this machine has only loopback")
    options = local.options
    for port in (options.dashboard_port, options.mlflow_port, options.s3_port, options.client_port):
        with pytest.raises(OSError, match="refused"), socket.create_connection((outward, port), timeout=5):
            pass


def test_a_second_one_a_taken_port_and_want_of_memory_are_refused_in_a_sentence(
    local: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ClusterError, match="a cluster is running in"):
        up(Path(local.folder), free_options(), node_environment={})
    with pytest.raises(ClusterError, match=f"--mlflow-port {local.options.mlflow_port}: 127.0.0.1:.* cannot be used"):
        up(tmp_path, free_options(mlflow_port=local.options.mlflow_port), node_environment={})
    with pytest.raises(ClusterError, match=r"--nodes 100000: the processes need about [\d.]+ GiB"):
        up(tmp_path, free_options(nodes=100_000), node_environment={})
    with pytest.raises(ClusterError, match="no cluster is up"):
        down(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "cluster.json").write_text("{")
    with pytest.raises(ClusterError, match="cannot be read"):
        find(tmp_path)


def test_what_dies_is_started_again(local: LocalCluster):
    before = states(local)["mlflow"][1]
    pid = int(before.split()[1].rstrip(","))
    os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not answers(f"{local.tracking_uri}/health"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert states(local)["mlflow"][1].split()[1] != before.split()[1]


def answers(url: str) -> bool:
    try:
        return status_of(url, None) == 200
    except OSError:
        return False


def a_cluster(folder: Path, **changed: object) -> LocalCluster:
    values = {"id": "0" * 16, "folder": str(folder), "scratch": str(folder), "created": 0.0, "boot": psutil.boot_time()}
    return LocalCluster(**{**values, "options": LocalOptions(), **changed})  # type: ignore[arg-type]


def test_its_processes_are_the_marked_ones_and_their_children_and_no_reader_of_a_log(tmp_path: Path):
    log = tmp_path / "raylet.log"
    log.write_text("a line\n")
    cluster = a_cluster(tmp_path)
    reader = subprocess.Popen(["tail", "-f", str(log)], stdout=subprocess.DEVNULL)
    # Its child has another environment, as a process whose title overwrote it.
    parent = subprocess.Popen(["sh", "-c", "env -i sleep 300; true"], env={**os.environ, MARK: cluster.id})
    other = subprocess.Popen(["sleep", "300"], env={**os.environ, MARK: "1" * 16})
    try:
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(parent.pid).children()) or children[0].name() != "sleep":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert {process.pid for process in processes(cluster)} == {parent.pid, children[0].pid}
        write_state(cluster)
        assert down(tmp_path) == 2
        assert reader.poll() is None and other.poll() is None and parent.wait(10) != 0
    finally:
        for process in (reader, parent, other):
            process.kill()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"gcs_port": 12000}, "--gcs-port 12000: Ray's workers use ports 10002 to 19999"),
        ({"mlflow_port": 19999}, "--mlflow-port 19999: Ray's workers"),
        ({"dashboard_port": 10001}, r"--dashboard-port\+1 10002: Ray's workers"),
        ({"store": "swift", "s3_port": 9999}, r"--s3-port\+3 10002: Ray's workers"),
        ({"mlflow_port": 8265}, "--dashboard-port 8265: 2 services cannot share one port"),
        ({"mlflow_port": 70000}, "--mlflow-port 70000: a port is a number"),
        ({"nodes": 0}, "at least one node"),
        ({"store": "minio"}, "give none or swift"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(tmp_path: Path, changed: dict, sentence: str):
    with pytest.raises(ClusterRequestError, match=sentence) as error:
        up(tmp_path / "folder", LocalOptions(**{"client_port": 9990, **changed}), node_environment={})
    assert error.value.exit_code == 2 and not (tmp_path / "folder").exists()


def test_sockets_get_a_short_folder_where_the_temporary_one_has_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long = tmp_path / ("x" * (110 - len(str(tmp_path)) - 1))
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    scratch = Path(make_scratch_folder())
    try:
        session = scratch / "node999" / "session_2026-01-01_00-00-00_000000_0000000" / "sockets"
        session.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(session / "plasma_store"))
    finally:
        shutil.rmtree(scratch)


def test_down_ends_what_a_killed_supervisor_left_and_nothing_else(tmp_path: Path):
    made = up(tmp_path, free_options(nodes=1, cpus_per_node=1), node_environment={})
    log = next(Path(made.scratch).glob("head/session_2*/logs/gcs_server.out"))
    bystander = subprocess.Popen(["tail", "-f", str(log)], stdout=subprocess.DEVNULL)
    try:
        for process in processes(made):
            if "supervisord" in " ".join(process.cmdline()):
                process.kill()
        assert len(processes(made)) > 5
        said = orchestrator("cluster", "status", "--folder", str(tmp_path))
        assert said.returncode == 1 and "supervisor" in said.stderr and "is gone" in said.stderr
        down(tmp_path)
        assert processes(made) == [] and find(tmp_path) is None
        assert not Path(made.scratch).exists()
        assert list(Path(tmp_path, "logs", "ray", "head").glob("gcs_server*"))  # for whoever wants to know why
        assert bystander.poll() is None
    finally:
        bystander.kill()
        if find(tmp_path) is not None:
            down(tmp_path)


def test_after_another_boot_the_old_state_is_known_to_be_stale(tmp_path: Path):
    stale = a_cluster(tmp_path, scratch=str(tmp_path / "scratch"), boot=psutil.boot_time() - 86_400)
    write_state(stale)
    assert processes(stale) == []
    said = orchestrator("cluster", "status", "--folder", str(tmp_path))
    assert said.returncode == 1 and "ended with its machine" in said.stderr
    assert down(tmp_path) == 0 and find(tmp_path) is None
