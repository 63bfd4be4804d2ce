"""The `submit` commands: run an experiment as a Ray job; watch, stop and list jobs."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.suggestions import SuggestingGroup
from orchestrator.cli.terminal import Debug, Experiment, Overrides, console, explained

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from orchestrator.launch.jobs_client import Cluster


class _RunsByDefault(SuggestingGroup):
    """Reads `submit NAME` as `submit run NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, with `run` before anything that is no command."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


submit_app = typer.Typer(
    cls=_RunsByDefault,
    no_args_is_help=True,
    help="Run an experiment as a job of a Ray cluster: `orchestrator submit NAME --address URL [KEY=VALUE]…`.",
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Address of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else the local cluster."
    ),
]
Job = Annotated[str, typer.Argument(help="Submission id, as `submit list` shows it.")]


def _dashboard(address: str | None) -> str:
    """`address`, else RAY_API_SERVER_ADDRESS, else that of the cluster which `cluster up local` started.

    For the local cluster this process takes the variables of its `env.sh`, except those that are set already.

    Raises:
        RequestError: there is no cluster.
    """
    from cluster.local import default_folder, find, processes
    from workloads.errors import RequestError

    if address is None:
        address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        here = find(default_folder())
        if here is None or not processes(here):
            raise RequestError(
                "--address: give the address of a cluster's dashboard, or start a cluster by `orchestrator cluster up local`"
            )
        for name, value in here.environment().items():
            os.environ.setdefault(name, value)
        address = here.dashboard
    return address


def _client(address: str | None) -> "tuple[JobSubmissionClient, Cluster]":
    """A client of the cluster at `address`, or of the default one."""
    dashboard = _dashboard(address)
    from orchestrator.launch.jobs_client import connect

    return connect(dashboard)


@submit_app.command("run")
def submit_run(
    experiment: Experiment,
    overrides: Overrides = None,
    address: Address = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Run the file's sweep instead of the one run.")] = False,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a job whose driver or node died is submitted again, to continue.")
    ] = 0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the job is submitted; do not wait for its end.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Send an experiment to a cluster and show its log; the exit code is the job's."""
    with explained(debug):
        from orchestrator.experiments.load import load_experiment, load_sweep

        address = _dashboard(address)
        arguments = overrides or []
        loaded = load_sweep(experiment, arguments) if sweep else load_experiment(experiment, arguments)
        client, _ = _client(address)
        from orchestrator.launch.follow import exit_code, may_try_again
        from orchestrator.launch.jobs_client import JobLostError
        from orchestrator.launch.submit import submit_job

        for attempt in range(retries + 1):
            job = submit_job(client, loaded, again=attempt > 0, debug=debug)
            typer.echo(f"job {job}")
            if detach:
                return
            try:
                details = _watch(client, job, raw=debug)
            except JobLostError as error:
                if attempt == retries:
                    raise
                typer.echo(f"{error}; submitting it again")
                continue
            if attempt == retries or not may_try_again(details):
                break
            typer.echo(f"the job was ended from outside ({_summary(details)}); submitting it again")
        code = exit_code(details)
        if code != 0:
            typer.echo(_summary(details), err=True)
        raise typer.Exit(code)


def _summary(details: "JobDetails") -> str:
    from orchestrator.launch.follow import describe

    rows = describe(details)
    return f"job {rows['job']} {rows['status']}: {rows['message']}"


def _watch(client: "JobSubmissionClient", job: str, *, raw: bool) -> "JobDetails":
    """Follow a job to its end; Ctrl-C asks whether to leave, stop or follow it further."""
    from orchestrator.launch.follow import follow

    def show(text: str) -> None:
        typer.echo(text, nl=False)

    while True:
        try:
            return follow(client, job, show=show, raw=raw)
        except KeyboardInterrupt:
            answer = "d"
            if sys.stdin.isatty():
                answer = typer.prompt("\nthe job goes on. d: leave it, s: stop it, f: follow it further", default="d")
            if answer.startswith("s"):
                client.stop_job(job)
                continue
            if answer.startswith("f"):
                continue
            typer.echo(f"left running; orchestrator submit logs {job} --follow, or submit stop {job}")
            raise typer.Exit(0) from None


@submit_app.command("status")
def submit_status(job: Job, address: Address = None, debug: Debug = False) -> None:
    """Show a job's status, run, times and message."""
    with explained(debug):
        from orchestrator.launch.follow import describe, details_of

        client, cluster = _client(address)
        for label, value in describe(details_of(client, job)).items():
            typer.echo(f"{label:<8} {value}")
        typer.echo(f"{'cluster':<8} {cluster.address} (Ray {cluster.ray}, Python {cluster.python})")


@submit_app.command("logs")
def submit_logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show new lines until the job has ended.")] = False,
    debug: Debug = False,
) -> None:
    """Show a job's log."""
    with explained(debug):
        client, _ = _client(address)
        from orchestrator.launch.follow import details_of, exit_code

        details_of(client, job)
        if follow:
            raise typer.Exit(exit_code(_watch(client, job, raw=debug)))
        typer.echo(client.get_job_logs(job), nl=False)


@submit_app.command("stop")
def submit_stop(job: Job, address: Address = None, debug: Debug = False) -> None:
    """Ask a job to save its state and end."""
    with explained(debug):
        client, _ = _client(address)
        from orchestrator.launch.follow import details_of

        details_of(client, job)
        client.stop_job(job)
        typer.echo(f"job {job} is stopping; the same experiment submitted again continues it")


@submit_app.command("list")
def submit_list(address: Address = None, debug: Debug = False) -> None:
    """List the cluster's jobs, newest first."""
    with explained(debug):
        from rich.table import Column, Table

        client, _ = _client(address)
        from orchestrator.launch.follow import describe

        jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
        columns = ("job", "status", "run", "began", "took")
        table = Table(*(Column(name, no_wrap=True, overflow="ignore") for name in columns), box=None)
        for row in map(describe, jobs):
            table.add_row(*(row[column] for column in columns))
        console().print(table, soft_wrap=True)  # so that ids can be copied
