"""Submits an experiment as a job of a Ray cluster (`submit_job`).

Sent are this package and the experiment with its overrides, about a megabyte. Credentials travel in a private file beside them,
never in the experiment, the job's environment or its metadata.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.job_submission import JobSubmissionClient

from orchestrator.experiments.spec import AnyExperiment, command_of, places_read
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.jobs_client import SubmitError
from orchestrator.ray_support import credentials
from orchestrator.ray_support.session import RESUBMITTED, uses_s3
from orchestrator.runs.identity import run_name
from orchestrator.tracking.addresses import without_secrets
from workloads.config import config_hash, to_yaml
from workloads.errors import ConfigError

_PACKAGES = ("orchestrator", "workloads", "cluster")
_LARGEST_MIB = 90.0  # Ray refuses a working directory of 100 MiB
_AGENT_S = 60.0


def job_name(experiment: AnyExperiment) -> str:
    """A new submission id that begins with the run's name."""
    stamp = time.strftime("%m%d-%H%M%S")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", experiment.tracking.run_name or experiment.name)[:60]
    return f"{name}-{config_hash(experiment.science)[:6]}-{stamp}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def working_directory(experiment: AnyExperiment, *, secret: Mapping[str, str]) -> Iterator[Path]:
    """A temporary folder with the package, the experiment file and, in a private file, the credentials.

    Raises:
        SubmitError: it is larger than Ray accepts.
    """
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="orchestrator-job-") as temporary:
        folder = Path(temporary)
        for package in _PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        if secret:
            credentials.write(folder, secret)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        if size > _LARGEST_MIB:
            raise SubmitError(
                f"the package in {root} has {size:.0f} MiB, and Ray accepts {_LARGEST_MIB:.0f} with a job; remove large files"
            )
        yield folder


def submit_job(
    client: JobSubmissionClient, experiment: AnyExperiment, *, again: bool = False, debug: bool = False
) -> str:
    """Send `experiment` as a job; returns its submission id.

    Args:
        again: an earlier job of the experiment was lost, perhaps with the head, so the cluster's nodes may not have joined yet.

    Raises:
        ConfigError: the experiment names something that the cluster cannot reach.
        SubmitError: the cluster does not accept the job.
    """
    check_portable(experiment, client.get_address())
    experiment, variables = without_password(experiment)
    visible, secret = credentials.divide({**credentials.gather(os.environ, s3=uses_s3(experiment)), **variables})
    job = job_name(experiment)
    is_sweep = isinstance(experiment, SweepExperiment)
    command = "sweep experiment.yaml --resume" if is_sweep else f"{command_of(experiment)} experiment.yaml"
    with working_directory(experiment, secret=secret) as folder:
        request: dict[str, Any] = {
            "entrypoint": f"python -m orchestrator {command}{' --debug' if debug else ''}",
            "submission_id": job,
            "runtime_env": {
                "working_dir": str(folder),
                "env_vars": {"PYTHONDONTWRITEBYTECODE": "1", **({RESUBMITTED: "1"} if again else {}), **visible},
            },
            "metadata": {
                "orchestrator.experiment": experiment.name,
                "mlflow.run_name": experiment.tracking.run_name or run_name(experiment),
                "mlflow.experiment": experiment.tracking.experiment,
                "config.sha256": config_hash(experiment.science),
            },
        }
        return _send(client, request)


def _send(client: JobSubmissionClient, request: dict[str, Any]) -> str:
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            return str(client.submit_job(**request))
        except (RuntimeError, ConnectionError, requests.RequestException) as error:
            # The node's agent, which accepts jobs, may start long after its raylet.
            if "No available agent" in str(error) and time.monotonic() < deadline:
                time.sleep(1.0)
                continue
            why = without_secrets(" ".join(str(error).split()))[:300]
            raise SubmitError(f"{without_secrets(client.get_address())} did not accept the job: {why}") from None


def without_password(experiment: AnyExperiment) -> tuple[AnyExperiment, dict[str, str]]:
    """The experiment without the password of its `tracking.uri`, and the variable that carries the address in its place.

    The experiment file is unpacked on every node and stays there; variables with a password travel as credentials.
    """
    uri = experiment.tracking.uri
    if uri is None or uri == without_secrets(uri):
        return experiment, {}
    tracking = dataclasses.replace(experiment.tracking, uri=None)
    return dataclasses.replace(experiment, tracking=tracking), {"MLFLOW_TRACKING_URI": uri}


def check_portable(experiment: AnyExperiment, address: str) -> None:
    """Check that a cluster on other machines can reach the stores that the experiment names.

    Raises:
        ConfigError: the tracking store is a file or on this machine's loopback; so is the object store; or a place that
            is read has a password in its address, which would be left on every node.
    """
    for key, place in {**places_read(experiment), "storage.path": experiment.storage.path}.items():
        if place != without_secrets(place):
            raise ConfigError(
                f"{key}: its address has a password; give the store's keys as variables (AWS_ACCESS_KEY_ID, …)"
            )
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    is_here = _is_loopback(address)
    if not is_here and (not uri.startswith(("http://", "https://")) or _is_loopback(uri)):
        raise ConfigError(
            f"tracking.uri: {without_secrets(uri) or 'none is given, and an SQLite file'} cannot be reached from the cluster "
            f"at {without_secrets(address)}; set it or MLFLOW_TRACKING_URI to a server that its nodes reach"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not is_here and endpoint and uses_s3(experiment) and _is_loopback(endpoint):
        raise ConfigError(
            f"AWS_ENDPOINT_URL: {without_secrets(endpoint)} is this machine's loopback, and the cluster at "
            f"{without_secrets(address)} cannot reach it; set it to an address that its nodes reach"
        )


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
