"""`orchestrator submit`: the same experiment as a job of a Ray cluster, watched from here.

What is sent is this package and the experiment with its overrides: about a megabyte, the same for the same code. The job's
status is the truth about it; its log is shown as far as it can be had, and a broken connection ends neither.
"""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.experiments.spec import AnyExperiment, SweepExperiment, command_of
from orchestrator.ray_support import credentials
from orchestrator.ray_support.session import RESUBMITTED, uses_s3
from orchestrator.runs.identity import run_name
from orchestrator.tracking.sink import without_secrets
from workloads.config import ConfigError, config_hash, to_yaml

LEAST_RAY, LEAST_PYTHON = "2.60", "3.11"

_PACKAGES = ("orchestrator", "workloads", "cluster")
_LARGEST_MIB = 90.0  # Ray refuses a working directory of 100 MiB
_TIMEOUT_S = (5.0, 30.0)  # to connect, to answer
_POLL_S = 1.0
_AGENT_S = 60.0
_ENDED_BY_ITSELF = (0, 1, 2)  # exit codes of `orchestrator`, after which there is nothing to try again
_LOG_FILE_LINES = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+\tINFO .*$\n?", re.MULTILINE)  # Ray's own chatter in a job's log


class SubmitError(RuntimeError):
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


async def _follow(client: JobClient, job: str, show: Callable[[str], None], *, patience_s: float) -> JobDetails:
    shown = 0
    lost_since: float | None = None

    async def tail() -> None:
        nonlocal shown
        passed = 0
        async for piece in client.tail(job):  # which begins anew after each connection
            passed += len(piece)
            if passed > shown:
                show(piece[len(piece) - (passed - shown) :])
                shown = passed

    task: asyncio.Task[None] | None = None
    try:
        while True:
            if task is None or task.done():
                if task is not None and not task.cancelled():
                    task.exception()  # a broken stream says nothing about the job
                task = asyncio.create_task(tail())
            await asyncio.sleep(_POLL_S)
            try:
                details = await asyncio.to_thread(client.get_job_info, job)
                lost_since = None
            except AuthenticationError:
                raise
            except (ConnectionError, requests.RequestException, RuntimeError) as error:
                if "does not exist" in str(error):
                    raise JobLostError(f"{job}: the cluster has forgotten it, as a new head does") from None
                now = time.monotonic()
                if lost_since is None:
                    lost_since = now
                    show(f"\n(no connection to {client.get_address()}; trying again)\n")
                if now - lost_since > patience_s:
                    raise SubmitError(
                        f"{client.get_address()} has not answered for {patience_s:.0f} s; the job may still run: "
                        f"orchestrator submit logs {job} --follow"
                    ) from None
                task.cancel()
                continue
            if details.status.is_terminal():
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(task, 3.0)
                with contextlib.suppress(Exception):
                    rest = (await asyncio.to_thread(client.get_job_logs, job))[shown:]
                    show(rest)
                return details
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


def follow(
    client: JobClient, job: str, *, show: Callable[[str], None], patience_s: float = 600.0, raw: bool = False
) -> JobDetails:
    """Show the job's log until it has ended.

    Args:
        patience_s: how long the cluster may stay away.
        raw: with Ray's own lines.

    Raises:
        JobLostError: the cluster knows no such job.
        SubmitError: the cluster stayed away.
    """
    return asyncio.run(
        _follow(client, job, show if raw else lambda text: show(_LOG_FILE_LINES.sub("", text)), patience_s=patience_s)
    )


def details_of(client: JobClient, job: str) -> JobDetails:
    """What the cluster knows of the job.

    Raises:
        SubmitError: nothing.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise SubmitError(f"{job}: the cluster knows no such job; see orchestrator submit list") from None
        raise


def exit_code(details: JobDetails) -> int:
    """The job's own; 1 where it has none."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return details.driver_exit_code or 1


def may_try_again(details: JobDetails) -> bool:
    """Whether the job was ended from outside (its driver or node died), so that the same again would continue it."""
    return details.status == JobStatus.FAILED and details.driver_exit_code not in _ENDED_BY_ITSELF


def describe(details: JobDetails) -> dict[str, str]:
    """What people want to know of a job; never its `runtime_env`."""
    metadata = details.metadata or {}
    began, ended = (details.start_time or 0) / 1000, (details.end_time or 0) / 1000
    seconds = (ended or time.time()) - began
    return {
        "job": details.submission_id or details.job_id or "",
        "status": details.status.value.lower(),
        "run": metadata.get("mlflow.run_name", ""),
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began else "",
        "took": f"{seconds:.0f} s" if began else "",
        "says": without_secrets(" ".join((details.message or "").partition(", last available logs")[0].split()))[:300],
    }
