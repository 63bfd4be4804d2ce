"""Starts a local cluster and waits until it takes jobs (`up`), and stops what was started, also after a crash (`down`)."""

import secrets
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from cluster.errors import ClusterError, ClusterRequestError
from cluster.local import supervisor
from cluster.local.dashboard import live_nodes, takes_jobs
from cluster.local.environment import service_environment, write_client_environment
from cluster.local.processes import end, processes, wait_until_gone
from cluster.local.services import create_bucket, node_name, programs
from cluster.local.state import (
    HEAD_HOST,
    LocalCluster,
    LocalOptions,
    find,
    make_scratch_folder,
    remove_state,
    write_private,
    write_state,
)

_NODE_GIB, _SERVICES_GIB = 0.35, 1.2  # measured: a raylet with its agents; GCS, dashboard, MLflow's server and Swift
_STOP_S = 20.0


def up(
    folder: Path,
    options: LocalOptions,
    *,
    node_environment: Mapping[str, str],
    say: Callable[[str], None] = lambda text: None,
) -> LocalCluster:
    """Start a cluster, and wait until it takes jobs.

    Args:
        node_environment: variables of the raylets, in addition to the cluster's own.
        say: called with the name of the service that is waited for.

    Raises:
        ClusterError: a cluster is running already, a port is taken, memory is short, or a service did not start; nothing is
            left running.
    """
    _check(folder, options)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "logs").mkdir(exist_ok=True)
    cluster = LocalCluster(
        id=secrets.token_hex(8),
        folder=str(folder.absolute()),
        scratch=make_scratch_folder(),
        created=time.time(),
        boot=psutil.boot_time(),
        options=options,
    )
    write_state(cluster)
    try:
        _start(cluster, node_environment, say)
    except BaseException:
        down(folder)
        raise
    return cluster


def _check(folder: Path, options: LocalOptions) -> None:
    """Refuse what cannot work before anything is written, and forget an earlier cluster that is gone."""
    if fault := next(options.faults(), None):
        raise ClusterRequestError(fault)
    earlier = find(folder)
    if earlier is not None and processes(earlier):
        raise ClusterError(f"a cluster is running in {folder} ({earlier.dashboard}); stop it by `cluster down`")
    for option, (host, port) in options.ports().items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ClusterError(f"{option} {port}: {host}:{port} cannot be used ({error.strerror})") from None
    needed = _SERVICES_GIB + _NODE_GIB * (options.nodes + 1)
    free = psutil.virtual_memory().available / 2**30
    if free < needed:
        raise ClusterError(
            f"--nodes {options.nodes}: the processes need about {needed:.1f} GiB before any work, and {free:.1f} GiB are free"
        )
    if earlier is not None:
        _remove(earlier)


def _start(cluster: LocalCluster, node_environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    options = cluster.options
    write_private(cluster.token_file, secrets.token_hex(32))
    if options.store == "swift":
        say("the S3 store's virtual environment (created once)")
    services = programs(cluster)
    write_client_environment(cluster)
    supervisor.start(cluster, services, service_environment(cluster, node_environment))
    deadline = time.monotonic() + options.timeout_s
    say("the head, MLflow" + (" and the S3 store" if options.store == "swift" else ""))
    nodes = [node_name(number) for number in range(1, options.nodes + 1)]
    supervisor.start_programs(cluster, [service.name for service in services if service.name not in nodes])
    supervisor.wait_for(cluster, "head", deadline, lambda: _listens(HEAD_HOST, options.gcs_port))
    say("the nodes")
    supervisor.start_programs(cluster, nodes)
    supervisor.wait_for(cluster, "head", deadline, lambda: len(live_nodes(cluster)) > options.nodes)
    supervisor.wait_for(cluster, "head", deadline, lambda: takes_jobs(cluster))
    say("MLflow")
    supervisor.wait_for(cluster, "mlflow", deadline, lambda: _answers(f"{cluster.tracking_uri}/health"))
    if cluster.s3_endpoint is not None:
        say("the S3 store")
        endpoint = cluster.s3_endpoint
        supervisor.wait_for(cluster, "s3-proxy", deadline, lambda: _answers(f"{endpoint}/healthcheck"))
        create_bucket(cluster)


def _listens(host: str, port: int) -> bool:
    with socket.create_connection((host, port), timeout=1):
        return True


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)


def down(folder: Path) -> int:
    """Stop every process of the cluster in `folder`; returns how many there were.

    The folder stays with MLflow's records and artifacts, the S3 store's objects, logs, token and keys. Ray's session folder is
    deleted, and with it the working directories of submitted jobs.

    Raises:
        ClusterError: no cluster was started there, or a process does not end.
    """
    cluster = find(folder)
    if cluster is None:
        raise ClusterError(f"no cluster is up in {folder}")
    alive = processes(cluster)
    if supervisor.states(cluster):
        supervisor.shut_down(cluster)
        wait_until_gone(cluster, _STOP_S)
    if left := end(cluster):
        raise ClusterError(f"processes {', '.join(str(process.pid) for process in left)} do not end")
    _remove(cluster)
    return len(alive)


def _remove(cluster: LocalCluster) -> None:
    """Forget a cluster whose processes have ended; copies Ray's logs to the other logs, and deletes its session folder."""
    for session in Path(cluster.scratch).glob("*/session_2*"):
        copy = cluster.logs / "ray" / session.parent.name
        if (session / "logs").is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(session / "logs", copy, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    remove_state(cluster)
