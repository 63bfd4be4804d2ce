"""Builds the commands of a local cluster's services: Ray's head and nodes, the MLflow server, and the S3 store's servers."""

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster import swift
from cluster.errors import ClusterError
from cluster.local.state import BUCKET, HEAD_HOST, LOOPBACK, LocalCluster, write_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A service that the supervisor runs."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of the supervisor."""


def programs(cluster: LocalCluster) -> list[Program]:
    """Every service of `cluster`; the nodes come last.

    Raises:
        ClusterError: the S3 store's environment or configuration cannot be created.
    """
    shared = cluster.services_environment()
    found = [
        Program(name="head", command=_ray_head(cluster), environment=shared),
        Program(name="mlflow", command=_mlflow(cluster), environment=shared),
    ]
    if cluster.options.store == "swift":
        variables = swift.server_environment()
        commands = _swift(cluster)
        found += [
            Program(name=f"s3-{kind}", command=command, environment=variables) for kind, command in commands.items()
        ]
    nodes = range(1, cluster.options.nodes + 1)
    return found + [Program(name=node_name(n), command=_ray_node(cluster, n), environment=shared) for n in nodes]


def node_name(number: int) -> str:
    """Name of the program that runs the raylet `number`, counted from 1."""
    return f"node{number}"


def _ray(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]


def _ray_head(cluster: LocalCluster) -> list[str]:
    options = cluster.options
    return _ray(
        *("--head", f"--node-ip-address={HEAD_HOST}", f"--port={options.gcs_port}", "--num-cpus=0"),
        *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={options.dashboard_port}"),
        f"--dashboard-agent-listen-port={options.dashboard_port + 1}",
        *(f"--ray-client-server-port={options.client_port}", f"--temp-dir={cluster.scratch}/head"),
    )


def _ray_node(cluster: LocalCluster, number: int) -> list[str]:
    options = cluster.options
    host = f"127.0.0.{2 + number}"
    return _ray(
        *(f"--address={HEAD_HOST}:{options.gcs_port}", f"--node-ip-address={host}"),
        f"--dashboard-agent-listen-port={options.dashboard_port + 1}",
        *(f"--num-cpus={options.cpus_per_node or os.cpu_count()}", f"--temp-dir={cluster.scratch}/{node_name(number)}"),
    )


def _mlflow(cluster: LocalCluster) -> list[str]:
    artifacts = f"s3://{BUCKET}/mlflow" if cluster.s3_endpoint else f"{cluster.folder}/artifacts"
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(cluster.options.mlflow_port)),
        *("--backend-store-uri", f"sqlite:///{cluster.folder}/mlflow.db", "--artifacts-destination", artifacts),
        *("--workers", "1"),
    ]


def _swift(cluster: LocalCluster) -> dict[str, list[str]]:
    """Commands of the S3 store's servers; its keys are created once and stay in the folder, as its objects do."""
    folder = Path(cluster.folder, "s3")
    folder.mkdir(exist_ok=True, mode=0o700)
    try:
        python = swift.make_environment(swift.home(), *swift.REQUIREMENTS)
    except (subprocess.SubprocessError, OSError) as error:
        raise ClusterError(f"--store swift: its virtual environment cannot be created: {error}") from None
    if not cluster.store_keys_file.exists():
        keys = f"aws_access_key_id = orchestrator:user\naws_secret_access_key = {secrets.token_hex(20)}\n"
        write_private(cluster.store_keys_file, f"[default]\n{keys}")
    access, secret = store_keys(cluster)
    ports = {kind: cluster.options.s3_port + i for i, kind in enumerate(("proxy", "account", "container", "object"))}
    try:
        return swift.configure(folder, python, ports=ports, access_key=access, secret_key=secret)
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"--store swift: {error.stderr.decode().strip()[-300:]}") from None


def store_keys(cluster: LocalCluster) -> tuple[str, str]:
    """Access key and secret key of the S3 store."""
    lines = cluster.store_keys_file.read_text(encoding="utf-8").splitlines()
    access, secret = (line.partition("= ")[2].strip() for line in lines[1:])
    return access, secret


def create_bucket(cluster: LocalCluster) -> None:
    """Create the cluster's bucket in its S3 store."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(*store_keys(cluster), region_name="us-east-1")
    addressing = Config(s3={"addressing_style": "path"})
    session.client("s3", endpoint_url=cluster.s3_endpoint, config=addressing).create_bucket(Bucket=BUCKET)
