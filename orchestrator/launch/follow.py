"""Follows a submitted job (`follow`): polls its status, streams its log, and describes how it ended (`describe`)."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.launch.jobs_client import JobLostError, SubmitError
from orchestrator.tracking.addresses import without_secrets

_POLL_S = 1.0
_LAST_LINES_S = 3.0
_OWN_EXIT_CODES = (0, 1, 2)  # of `orchestrator`: the job ended by itself, and would end the same way again
_RAY_LINES = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+\tINFO .*$\n?", re.MULTILINE)  # Ray's own messages in a job's log

Show = Callable[[str], None]


class _LogStream:
    """Shows a job's log as it grows; each new connection sends the log from its beginning, which is shown only once."""

    def __init__(self, client: JobSubmissionClient, job: str, show: Show) -> None:
        self._client, self._job, self._show = client, job, show
        self._shown = 0
        self._task: asyncio.Task[None] | None = None

    def ensure_running(self) -> None:
        """Connect (again) if there is no connection; a broken stream says nothing about the job."""
        if self._task is not None and self._task.done():
            if not self._task.cancelled():
                self._task.exception()
            self._task = None
        if self._task is None:
            self._task = asyncio.create_task(self._stream())

    async def _stream(self) -> None:
        received = 0
        async for piece in self._client.tail_job_logs(self._job):
            received += len(piece)
            if received > self._shown:
                self._show(piece[len(piece) - (received - self._shown) :])
                self._shown = received

    def disconnect(self) -> None:
        """Drop the connection."""
        if self._task is not None:
            self._task.cancel()

    async def finish(self) -> None:
        """Show what is left of the log of a job that has ended."""
        if self._task is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._task, _LAST_LINES_S)
        with contextlib.suppress(Exception):
            self._show((await asyncio.to_thread(self._client.get_job_logs, self._job))[self._shown :])

    async def close(self) -> None:
        """Drop the connection and wait until it is closed."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(BaseException):
                await self._task


async def _follow(client: JobSubmissionClient, job: str, show: Show, *, patience_s: float) -> JobDetails:
    log = _LogStream(client, job, show)
    lost_since: float | None = None
    try:
        while True:
            log.ensure_running()
            await asyncio.sleep(_POLL_S)
            try:
                details = await asyncio.to_thread(client.get_job_info, job)
                lost_since = None
            except AuthenticationError:
                raise
            except (ConnectionError, requests.RequestException, RuntimeError) as error:
                _raise_if_lost(job, error)
                if lost_since is None:
                    lost_since = time.monotonic()
                    show(f"\n(no connection to {client.get_address()}; trying again)\n")
                if time.monotonic() - lost_since > patience_s:
                    raise SubmitError(
                        f"{client.get_address()} has not answered for {patience_s:.0f} s; the job may still run: "
                        f"orchestrator submit logs {job} --follow"
                    ) from None
                log.disconnect()
                continue
            if details.status.is_terminal():
                await log.finish()
                return details
    finally:
        await log.close()


def _raise_if_lost(job: str, error: Exception) -> None:
    if "does not exist" in str(error):  # Ray raises a plain RuntimeError for it
        raise JobLostError(f"{job}: the cluster no longer knows the job; its head was replaced") from None


def follow(
    client: JobSubmissionClient, job: str, *, show: Show, patience_s: float = 600.0, raw: bool = False
) -> JobDetails:
    """Show the job's log until the job has ended.

    The status is polled and decides the outcome. The log is streamed beside it, and connects again when it breaks.

    Args:
        patience_s: how long the cluster may not answer, seconds.
        raw: show Ray's own messages too.

    Raises:
        JobLostError: the cluster does not know the job.
        SubmitError: the cluster did not answer for `patience_s`.
    """

    def filtered(text: str) -> None:
        show(_RAY_LINES.sub("", text))

    return asyncio.run(_follow(client, job, show if raw else filtered, patience_s=patience_s))


def details_of(client: JobSubmissionClient, job: str) -> JobDetails:
    """The cluster's record of the job.

    Raises:
        SubmitError: the cluster does not know the job.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise SubmitError(f"{job}: the cluster knows no such job; see `orchestrator submit list`") from None
        raise


def exit_code(details: JobDetails) -> int:
    """The exit code of the job's driver; 1 if it has none."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return details.driver_exit_code or 1


def may_try_again(details: JobDetails) -> bool:
    """Whether the job was ended from outside (its driver or node died), so that submitting it again continues it."""
    return details.status == JobStatus.FAILED and details.driver_exit_code not in _OWN_EXIT_CODES


def describe(details: JobDetails) -> dict[str, str]:
    """Label → value of what a user wants to know of a job; never its `runtime_env`."""
    metadata = details.metadata or {}
    began, ended = (details.start_time or 0) / 1000, (details.end_time or 0) / 1000
    seconds = (ended or time.time()) - began
    message = " ".join((details.message or "").partition(", last available logs")[0].split())
    return {
        "job": details.submission_id or details.job_id or "",
        "status": details.status.value.lower(),
        "run": metadata.get("mlflow.run_name", ""),
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began else "",
        "took": f"{seconds:.0f} s" if began else "",
        "message": without_secrets(message)[:300],
    }
