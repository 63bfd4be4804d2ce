"""Credentials on their way to a cluster: no command line, log or page of Ray's shows them.

Ray writes a `runtime_env` into its logs and shows it in its dashboard, so credentials never are among its variables. From the
client they travel in a file of the job's working directory, which its driver reads at its start. From a driver they travel
through Ray's key-value store, from where each process of the job fetches them before it does anything else.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.ray_support.private import KeyValueStore, in_submitted_job

FILE = "job-credentials.json"

_KEY = "ORCHESTRATOR_CREDENTIALS"  # variable that names the key under which they are
_WAIT_S = 30.0
_PASSED = ("AWS_", "MLFLOW_TRACKING_")
_OPEN = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"),
    "MLFLOW_TRACKING_URI",
)
_OF_THIS_MACHINE = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")


def gather(environment: Mapping[str, str], *, s3: bool) -> dict[str, str]:
    """Every variable of `environment` that a job needs for its stores, MLflow's and, if `s3`, the object store's.

    Keys that a file of this machine holds are read, because the file is not on the cluster.
    """
    wanted = _PASSED if s3 else _PASSED[1:]
    found = {name: value for name, value in environment.items() if name.startswith(wanted) and value}
    if s3 and "AWS_ACCESS_KEY_ID" not in found:
        found |= _from_files()
    return {name: value for name, value in found.items() if name not in _OF_THIS_MACHINE}


def _from_files() -> dict[str, str]:
    import boto3

    held = boto3.session.Session().get_credentials()
    if held is None or held.method not in ("shared-credentials-file", "config-file"):
        return {}  # a role's keys run out: the cluster's nodes have a role of their own
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    frozen = held.get_frozen_credentials()
    values = (frozen.access_key, frozen.secret_key, frozen.token)
    return {name: value for name, value in zip(names, values, strict=True) if value}


def divide(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Those that anyone may see, and those that nobody may."""
    seen = {name: value for name, value in variables.items() if _is_open(name, value)}
    return seen, {name: value for name, value in variables.items() if name not in seen}


def _is_open(name: str, value: str) -> bool:
    return not name.startswith(_PASSED) or (name in _OPEN and "@" not in urlsplit(value).netloc)


def write(folder: Path, secret: Mapping[str, str]) -> None:
    """Leave `secret` for the driver of a job whose working directory `folder` becomes."""
    path = folder / FILE
    path.touch(mode=0o600)
    # Ray keeps a directory that it has unpacked before: no two jobs' are the same, so each finds its own file.
    path.write_text(json.dumps({"once": uuid.uuid4().hex, "variables": dict(secret)}), encoding="utf-8")


def read() -> None:
    """In a submitted job's driver: take what its client left in the working directory, and leave nothing there."""
    path = Path(FILE)
    if in_submitted_job() and path.is_file():
        os.environ.update(json.loads(path.read_text(encoding="utf-8"))["variables"])
        path.unlink()


def promise() -> tuple[dict[str, str], str]:
    """For a driver's `runtime_env`: variables and the setup hook of processes that will look for what it delivers."""
    return {_KEY: uuid.uuid4().hex}, f"{__name__}.fetch"


def deliver(variables: Mapping[str, str], secret: Mapping[str, str]) -> None:
    """Put `secret` where processes with the promise's `variables` look for it."""
    KeyValueStore().put(variables[_KEY], json.dumps(dict(secret)))


def fetch() -> None:
    """In a process of the job, before it has work: take what its driver delivered."""
    Path(FILE).unlink(missing_ok=True)  # every node unpacks the working directory
    deadline = time.monotonic() + _WAIT_S  # Ray may start a process before the driver has delivered
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            kept = KeyValueStore().get(os.environ[_KEY])
            if kept:
                os.environ.update(json.loads(kept))
                return
        time.sleep(0.1)
