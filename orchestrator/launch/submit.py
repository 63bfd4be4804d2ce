"""`orchestrator submit`: the same experiment as a job of a Ray cluster, watched from here.

What is sent is this package and the experiment with its overrides: about a megabyte, the same for the same code. The job's
status is the truth about it; its log is shown as far as it can be had, and a broken connection ends neither.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from orchestrator.experiments.spec import AnyExperiment, command_of
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.jobs_client import JobClient, SubmitError
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
    """A submission id: readable, and never used before."""
    stamp = time.strftime("%m%d-%H%M%S")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", experiment.tracking.run_name or experiment.name)[:60]
    return f"{name}-{config_hash(experiment.science)[:6]}-{stamp}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def working_directory(experiment: AnyExperiment, *, secret: Mapping[str, str]) -> Any:
    """A folder with what the job needs, as long as the context lasts.

    Raises:
        SubmitError: it is larger than Ray takes.
    """
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="orchestrator-job-") as made:
        folder = Path(made)
        for package in _PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        if secret:
            credentials.write(folder, secret)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        if size > _LARGEST_MIB:
            raise SubmitError(f"the package in {root} has {size:.0f} MiB, and Ray takes {_LARGEST_MIB:.0f} with a job")
        yield folder


def submit_job(client: JobClient, experiment: AnyExperiment, *, again: bool = False, debug: bool = False) -> str:
    """Send `experiment` as a job; returns its submission id.

    Args:
        again: whether an earlier job of it was lost, perhaps with its head, so that nodes may yet have to join.

    Raises:
        ConfigError: what it says cannot work on a cluster.
        SubmitError: the cluster does not take it.
    """
    check_portable(experiment, client.get_address())
    seen, secret = credentials.divide(credentials.gather(os.environ, s3=uses_s3(experiment)))
    job = job_name(experiment)
    is_sweep = isinstance(experiment, SweepExperiment)
    command = "sweep experiment.yaml --resume" if is_sweep else f"{command_of(experiment)} experiment.yaml"
    with working_directory(experiment, secret=secret) as folder:
        request: dict[str, Any] = {
            "entrypoint": f"python -m orchestrator {command}{' --debug' if debug else ''}",
            "submission_id": job,
            "runtime_env": {
                "working_dir": str(folder),
                "env_vars": {"PYTHONDONTWRITEBYTECODE": "1", **({RESUBMITTED: "1"} if again else {}), **seen},
            },
            "metadata": {
                "orchestrator.experiment": experiment.name,
                "mlflow.run_name": experiment.tracking.run_name or run_name(experiment),
                "mlflow.experiment": experiment.tracking.experiment,
                "config.sha256": config_hash(experiment.science),
            },
        }
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                return str(client.submit_job(**request))
            except (RuntimeError, ConnectionError, requests.RequestException) as error:
                # The node's agent, which takes jobs, may come up long after its raylet.
                if "No available agent" in str(error) and time.monotonic() < deadline:
                    time.sleep(1.0)
                    continue
                told = without_secrets(" ".join(str(error).split()))[:300]
                raise SubmitError(f"{without_secrets(client.get_address())} did not take the job: {told}") from None


def check_portable(experiment: AnyExperiment, address: str) -> None:
    """See that what the experiment names is there for a machine that is not this one.

    Raises:
        ConfigError: the tracking store is a file, or its address is this machine's loopback and the cluster is elsewhere.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    is_here = _is_loopback(address)
    if not is_here and (not uri.startswith(("http://", "https://")) or _is_loopback(uri)):
        raise ConfigError(
            f"tracking.uri: {without_secrets(uri) or 'none is given, and an SQLite file'} cannot be reached from the cluster "
            f"at {without_secrets(address)}; set it or MLFLOW_TRACKING_URI to a server that its nodes reach"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not is_here and endpoint and uses_s3(experiment) and _is_loopback(endpoint):
        raise ConfigError(f"AWS_ENDPOINT_URL: {endpoint} is this machine's own; the cluster is at {address}")


def _is_loopback(address: str) -> bool:
    host = requests.utils.urlparse(address).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")
