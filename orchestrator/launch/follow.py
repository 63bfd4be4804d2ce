"""Follows a submitted job: polls its status, streams its log, and describes how it ended."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus

from orchestrator.launch.jobs_client import JobClient, JobLostError, SubmitError
from orchestrator.tracking.addresses import without_secrets

_POLL_S = 1.0
_ENDED_BY_ITSELF = (0, 1, 2)  # exit codes of `orchestrator`, after which there is nothing to try again
_LOG_FILE_LINES = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+\tINFO .*$\n?", re.MULTILINE)  # Ray's own chatter in a job's log


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
