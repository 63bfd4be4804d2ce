"""A client of Ray's job API with bounded waits, and the check of the cluster's versions."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from orchestrator.tracking.addresses import without_secrets
from workloads.errors import ConfigError, RunFailedError

LEAST_RAY, LEAST_PYTHON = "2.60", "3.11"
_TIMEOUT_S = (5.0, 30.0)  # to connect, to answer


class SubmitError(RunFailedError):
    """The cluster does not take the job, or does not answer; the message says why."""


class JobLostError(SubmitError):
    """The cluster no longer knows a job that it took: its head was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a cluster says of itself."""

    address: str
    ray: str
    python: str


class JobClient(JobSubmissionClient):
    """Ray's client, with an end to every wait."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, timeout=_TIMEOUT_S, **options)

    def ask(self, path: str) -> Any:
        """What the cluster's HTTP API answers, decoded."""
        answer = self._do_request("GET", path)
        answer.raise_for_status()
        return answer.json()

    async def tail(self, job: str) -> AsyncIterator[str]:
        """Pieces of the job's log from its beginning; ends when the connection does."""
        url = f"{self.get_address()}/api/jobs/{job}/logs/tail"
        async with (
            aiohttp.ClientSession(cookies=self._cookies) as session,
            session.ws_connect(url, headers=self._headers, ssl=self._ssl_context, heartbeat=10.0) as socket,
        ):
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    yield message.data


def connect(address: str) -> tuple[JobClient, Cluster]:
    """A client of the cluster at `address`, if it is one that can run this package.

    Raises:
        SubmitError: it does not answer, refuses the token, or runs too old a Ray or Python.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: give the dashboard's address, as http://127.0.0.1:8265")
    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # they tell of every upload
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # Ray would take it before the address that it is given
    with _in_words(address):
        client = JobClient(address)
        told = client.ask("/api/v0/cluster_metadata")["data"]
        cluster = Cluster(address=address, ray=told["rayVersion"], python=told["pythonVersion"])
    for what, have, least in (("Ray", cluster.ray, LEAST_RAY), ("Python", cluster.python, LEAST_PYTHON)):
        if Version(have) < Version(least):
            raise SubmitError(f"{address}: the cluster runs {what} {have}; {least} or newer is needed")
    return client, cluster


@contextlib.contextmanager
def _in_words(address: str) -> Any:
    shown = without_secrets(address)
    try:
        yield
    except AuthenticationError as error:
        why = "it was not given one" if "required" in str(error) else "it does not accept this one"
        raise SubmitError(
            f"{shown}: the cluster wants a token, and {why}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, requests.RequestException) as error:
        raise SubmitError(f"{shown}: no Ray cluster answers there ({type(error).__name__})") from None
    except (KeyError, ValueError, RuntimeError) as error:
        raise SubmitError(f"{shown}: this is not a Ray cluster's dashboard ({str(error)[:200]})") from None
