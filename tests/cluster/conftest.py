"""A cluster that `cluster up local` brings up, shared by the tests of this folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.local import LocalCluster, LocalOptions, down, find, up
from orchestrator.ray_support.spare_processes import importing
from orchestrator.training import PRELOAD
from tests.orchestrator.conftest import datasets
from tests.s3_peer import free_port, made_environment

__all__ = ["datasets"]


def free_options(**changed: object) -> LocalOptions:
    """Options whose ports nobody uses now."""
    from cluster import swift

    if changed.get("store") == "swift":
        made_environment(swift.home(), *swift.REQUIREMENTS)
    names = ("gcs_port", "dashboard_port", "client_port", "mlflow_port", "s3_port")
    ports = {name: free_port() for name in names}
    return replace(LocalOptions(**ports), **changed)  # type: ignore[arg-type]


@pytest.fixture(scope="package")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes of one CPU, MLflow, and an S3 store."""
    folder = tmp_path_factory.mktemp("local")
    options = free_options(nodes=2, cpus_per_node=1, store="swift")
    made = up(folder, options, node_environment={**importing(PRELOAD), "RAY_worker_niceness": "0"})
    yield made
    if find(folder) is not None:
        down(folder)


def orchestrator(
    *arguments: str, cluster: LocalCluster | None = None, timeout_s: float = 240.0, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """The command, as somebody gives it who has sourced the cluster's `env.sh`."""
    foreign = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH", "MLFLOW_", "AWS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment = {**kept, **(cluster.environment() if cluster else {}), **variables}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def everything_written(cluster: LocalCluster) -> Iterator[Path]:
    """Every file below the cluster's folders, Ray's sessions included."""
    for root in (cluster.folder, cluster.scratch):
        for path in Path(root).rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path
