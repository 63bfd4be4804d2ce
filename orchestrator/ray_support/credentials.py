"""Passes credentials to a cluster without any command line, log or page of Ray's showing them.

Ray writes a `runtime_env` into its logs and shows it in its dashboard, so credentials never are among its variables. From the
client they travel in a file of the job's working directory, which its driver reads at its start. From a driver they travel
through Ray's key-value store, from where each process of the job fetches them before it does anything else; they are deleted
when the driver exits.
"""

import atexit
import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.ray_support.private import KeyValueStore, ended_jobs, in_submitted_job, job_id

FILE = "job-credentials.json"

_KEY = "ORCHESTRATOR_CREDENTIALS"  # variable that holds their key in the store
_PREFIX = "credentials/"
_WAIT_S = 30.0
_PASSED = ("AWS_", "MLFLOW_TRACKING_")
_OPEN = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"),
    "MLFLOW_TRACKING_URI",
)
_OF_THIS_MACHINE = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")


def gather(environment: Mapping[str, str], *, s3: bool) -> dict[str, str]:
    """The variables of `environment` that a job needs for MLflow and, if `s3`, for the object store.

    Keys in a credentials file are read from it, because the file is not on the cluster.
    """
    wanted = _PASSED if s3 else _PASSED[1:]
    passed = {name: value for name, value in environment.items() if name.startswith(wanted) and value}
    if s3 and "AWS_ACCESS_KEY_ID" not in passed:
        passed |= _from_files()
    return {name: value for name, value in passed.items() if name not in _OF_THIS_MACHINE}


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
    """Separate the variables into (plain, secret)."""
    seen = {name: value for name, value in variables.items() if _is_open(name, value)}
    return seen, {name: value for name, value in variables.items() if name not in seen}


def _is_open(name: str, value: str) -> bool:
    return not name.startswith(_PASSED) or (name in _OPEN and "@" not in urlsplit(value).netloc)


def write(folder: Path, secret: Mapping[str, str]) -> None:
    """Write `secret` into `folder`, the working directory of a job that will be submitted, for its driver to read."""
    path = folder / FILE
    path.touch(mode=0o600)
    # Ray keeps a directory that it has unpacked before: no two jobs' are the same, so each finds its own file.
    path.write_text(json.dumps({"once": uuid.uuid4().hex, "variables": dict(secret)}), encoding="utf-8")


def read() -> None:
    """In a submitted job's driver: set the variables that its client wrote into the working directory, and delete the file."""
    path = Path(FILE)
    if in_submitted_job() and path.is_file():
        os.environ.update(json.loads(path.read_text(encoding="utf-8"))["variables"])
        path.unlink()


def promise() -> tuple[dict[str, str], str]:
    """The variables and the setup hook for a driver's `runtime_env`, by which its processes find what it will deliver."""
    return {_KEY: f"{_PREFIX}{uuid.uuid4().hex}"}, f"{__name__}.fetch"


def deliver(variables: Mapping[str, str], secret: Mapping[str, str]) -> None:
    """Put `secret` where processes with the promise's `variables` look for it, until this driver exits.

    Removes what drivers of ended jobs left that were killed.
    """
    store, key = KeyValueStore(), variables[_KEY]
    store.put(key, json.dumps({"job": job_id(), "variables": dict(secret)}))
    atexit.register(_withdraw, key)  # after Ray registered its own end, so before that
    with contextlib.suppress(Exception):
        ended = ended_jobs()
        for other in store.keys(_PREFIX):
            if json.loads(store.get(other) or b"{}").get("job") in ended:
                store.delete(other)


def _withdraw(key: str) -> None:
    with contextlib.suppress(Exception):  # the cluster may be gone, and its memory with it
        KeyValueStore().delete(key)


class CredentialsMissingError(RuntimeError):
    """A process of a job did not get its credentials, so it could reach neither the storage nor the tracking server."""


def fetch() -> None:
    """In a process of the job, before it has work: take what its driver delivered.

    Raises:
        CredentialsMissingError: there is nothing; Ray shows the message as the reason of the process's end.
    """
    Path(FILE).unlink(missing_ok=True)  # every node unpacks the working directory
    store, key, error = KeyValueStore(), os.environ[_KEY], ""
    deadline = time.monotonic() + _WAIT_S  # Ray may start a process before the driver has delivered
    while time.monotonic() < deadline:
        try:
            value = store.get(key)
        except Exception as failure:
            value, error = None, f" ({failure})"
        if value:
            os.environ.update(json.loads(value)["variables"])
            return
        time.sleep(0.1)
    raise CredentialsMissingError(
        f"the job's credentials did not arrive within {_WAIT_S:g} s{error}: its driver has ended, or Ray's head is overloaded"
    )
