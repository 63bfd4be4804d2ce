"""Connects to a cluster's job API (`connect`), checks the cluster's versions, and defines what goes wrong with jobs."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from orchestrator.ray_support.private import JOB_LOGGERS, cluster_versions, job_client
from orchestrator.tracking.addresses import without_secrets
from workloads.errors import ConfigError, RunFailedError

LEAST_RAY, LEAST_PYTHON = "2.60", "3.11"
_TIMEOUT_S = (5.0, 30.0)  # to connect, to answer
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class SubmitError(RunFailedError):
    """The cluster refuses the job or does not answer; the message says why."""


class JobLostError(SubmitError):
    """The cluster no longer knows a job that it accepted: its head was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Address and versions of a cluster."""

    address: str
    ray: str
    python: str


def connect(address: str) -> tuple[JobSubmissionClient, Cluster]:
    """A client of the cluster at `address`, if that cluster can run this package.

    Raises:
        ConfigError: `address` is not a dashboard's URL.
        SubmitError: the cluster does not answer, refuses the token, or runs too old a Ray or Python.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: give the dashboard's address, as http://127.0.0.1:8265")
    for name in JOB_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _connection_errors(address):
        with _without_variables(_OVERRIDING):
            client = job_client(address, timeout_s=_TIMEOUT_S)
        ray, python = cluster_versions(client)
    for software, have, least in (("Ray", ray, LEAST_RAY), ("Python", python, LEAST_PYTHON)):
        if Version(have) < Version(least):
            raise SubmitError(f"{address}: the cluster runs {software} {have}; {least} or newer is needed")
    return client, Cluster(address=address, ray=ray, python=python)


@contextlib.contextmanager
def _without_variables(names: tuple[str, ...]) -> Iterator[None]:
    """Hide environment variables from Ray, which would prefer them to the address that it is given."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _connection_errors(address: str) -> Iterator[None]:
    """Turn the errors of a first connection into a `SubmitError` of one sentence."""
    shown = without_secrets(address)
    try:
        yield
    except AuthenticationError as error:
        why = "none was sent" if "required" in str(error) else "it does not accept this one"
        raise SubmitError(
            f"{shown}: the cluster requires a token, and {why}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, requests.RequestException) as error:
        raise SubmitError(f"{shown}: no Ray cluster answers there ({type(error).__name__})") from None
    except (KeyError, ValueError, RuntimeError) as error:
        raise SubmitError(f"{shown}: this is not a Ray cluster's dashboard ({str(error)[:200]})") from None
