"""The `submit` commands: run an experiment as a Ray job; watch, stop and list jobs."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.terminal import Debug, Overrides, console, explained


class _RunsByDefault(TyperGroup):
    """`submit NAME` is `submit run NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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
        "--address", help="Dashboard of the cluster; default: RAY_API_SERVER_ADDRESS, else the local cluster."
    ),
]
Job = Annotated[str, typer.Argument(help="Submission id.")]


def _client(address: str | None) -> Any:
    """A client of the cluster that is meant; with none named, of the one that `cluster up local` started."""
    from cluster.local import default_folder, find, processes
    from workloads.errors import ConfigError

    if address is None:
        address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        here = find(default_folder())
        if here is None or not processes(here):
            raise ConfigError("--address: give a cluster's dashboard, or start one: orchestrator cluster up local")
        for name, value in here.environment().items():
            os.environ.setdefault(name, value)
        address = here.dashboard
    from orchestrator.launch.jobs_client import connect

    return connect(address)


@submit_app.command("run")
def submit_run(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or path of its YAML file.")],
    overrides: Overrides = None,
    address: Address = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Run the file's sweep instead of the one run.")] = False,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a job that was ended from outside is submitted again, to continue.")
    ] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
    debug: Debug = False,
) -> None:
    """Send an experiment to a cluster and show its log; the exit code is the job's."""
    with explained(debug):
        from orchestrator.experiments.load import load_experiment, load_sweep

        given = overrides or []
        loaded = load_sweep(experiment, given) if sweep else load_experiment(experiment, given)
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
            typer.echo(f"the job was ended from outside ({_line(details)}); submitting it again")
        if details.status.value != "SUCCEEDED":
            typer.echo(_line(details), err=True)
        raise typer.Exit(exit_code(details))


def _line(details: Any) -> str:
    from orchestrator.launch.follow import describe

    told = describe(details)
    return f"job {told['job']} {told['status']}: {told['says']}"


def _watch(client: Any, job: str, *, raw: bool) -> Any:
    """Follow a job; Ctrl-C asks what is meant."""
    from orchestrator.launch.follow import follow

    def show(text: str) -> None:
        typer.echo(text, nl=False)

    while True:
        try:
            return follow(client, job, show=show, raw=raw)
        except KeyboardInterrupt:
            meant = "d"
            if sys.stdin.isatty():
                meant = typer.prompt("\nthe job goes on. d: leave it, s: stop it, f: follow it further", default="d")
            if meant.startswith("s"):
                client.stop_job(job)
                continue
            if meant.startswith("f"):
                continue
            typer.echo(f"left running; orchestrator submit logs {job} --follow, or submit stop {job}")
            raise typer.Exit(0) from None


@submit_app.command("status")
def submit_status(job: Job, address: Address = None, debug: Debug = False) -> None:
    """What became of a job."""
    with explained(debug):
        from orchestrator.launch.follow import describe, details_of

        client, cluster = _client(address)
        for what, value in describe(details_of(client, job)).items():
            typer.echo(f"{what:<8} {value}")
        typer.echo(f"{'cluster':<8} {cluster.address} (Ray {cluster.ray}, Python {cluster.python})")


@submit_app.command("logs")
def submit_logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job has ended.")] = False,
    debug: Debug = False,
) -> None:
    """A job's log."""
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
    """The cluster's jobs, newest first."""
    with explained(debug):
        from rich.table import Column, Table

        client, _ = _client(address)
        from orchestrator.launch.follow import describe

        jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
        columns = ("job", "status", "run", "began", "took")
        table = Table(*(Column(name, no_wrap=True, overflow="ignore") for name in columns), box=None)
        for row in map(describe, jobs):
            table.add_row(*(row[column] for column in columns))
        console().print(table, soft_wrap=True)  # ids are there to be copied whole
