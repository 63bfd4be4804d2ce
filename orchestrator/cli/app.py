"""The entry point of the `orchestrator` command: `main` registers every command, runs one, and exits with its code."""

import os
import sys

import typer

from orchestrator.cli import listing, runs  # noqa: F401  (their import registers their commands)
from orchestrator.cli.cluster import cluster_app
from orchestrator.cli.data import data_app
from orchestrator.cli.jobs import submit_app
from orchestrator.cli.root import app
from orchestrator.cli.suggestions import UsageError, usage_fault
from orchestrator.ray_support import credentials

app.add_typer(data_app, name="data")
app.add_typer(cluster_app, name="cluster")
app.add_typer(submit_app, name="submit")

REFUSED = 2


def main() -> None:
    """Entry point of the console script."""
    code = run()
    if code == REFUSED and not _ray_runs():
        # Nothing was started, so nothing needs an orderly end; unloading torch and its threads can take seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the run failed, 2 the request was wrong."""
    credentials.read()
    try:
        code = app(args=arguments, prog_name="orchestrator", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; run the same command again to continue", err=True)
        return 1
    except UsageError as error:
        typer.echo(f"error: {usage_fault(error)}", err=True)
        return REFUSED
