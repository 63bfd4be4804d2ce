"""The entry point of the `orchestrator` command: registers every command and turns its end into an exit code."""

import sys

import typer

from orchestrator.cli import data, listing, runs  # noqa: F401 - importing them registers their commands
from orchestrator.cli.cluster import cluster_app
from orchestrator.cli.jobs import submit_app
from orchestrator.cli.root import app, data_app
from orchestrator.ray_support import credentials

app.add_typer(data_app, name="data")
app.add_typer(cluster_app, name="cluster")
app.add_typer(submit_app, name="submit")


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    credentials.read()
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; give the same command again to continue", err=True)
        return 1
    except Exception as error:
        explain = getattr(error, "format_message", None)  # a usage error, of click or of typer's own copy of it
        if explain is None:
            raise
        typer.echo(f"error: {explain()}", err=True)
        return 2
