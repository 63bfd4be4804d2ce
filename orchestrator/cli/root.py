"""The typer applications to which the command modules add their commands: `app` and `data_app`."""

from importlib.metadata import version
from typing import Annotated

import typer

from orchestrator.cli.suggestions import SuggestingGroup

_HELP = "Pretrain, compare and use detector backbones. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."

# torch, Ray and MLflow are imported inside the commands: `--help` and a mistyped name must not wait for them.
app = typer.Typer(
    cls=SuggestingGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP
)
data_app = typer.Typer(
    cls=SuggestingGroup, no_args_is_help=True, help="Build, verify and describe datasets of Parquet shards."
)


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"orchestrator {version('orchestrator')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; its help is the application's."""
