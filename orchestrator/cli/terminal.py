"""Parts that the commands share: option types, the console, error messages (`explained`) and a progress counter (`counting`)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Experiment = Annotated[str, typer.Argument(help="Name of an experiment, or path of its YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted keys to override; of a key given twice the last counts."),
]
Run = Annotated[str, typer.Argument(help="MLflow run id, or run name.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store; default: MLFLOW_TRACKING_URI, else runs/mlflow.db.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the workers' own output.")]


@contextlib.contextmanager
def explained(debug: bool) -> Iterator[None]:
    """Turn an error into one sentence and an exit code; with `debug`, let it pass.

    A `UserError` or `ClusterError` is meant for the user. Any other is a defect, for which the sentence mentions --debug.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except Exception as error:
        if debug:
            raise
        from cluster.errors import ClusterError
        from workloads.errors import UserError

        text = " ".join(str(error).split())
        if isinstance(error, (UserError, ClusterError)):
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(error.exit_code) from None
        typer.echo(f"error: {text or type(error).__name__} (--debug shows where)", err=True)
        raise typer.Exit(1) from None


def console() -> "Console":
    """A console on standard output."""
    from rich.console import Console

    return Console()


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that draws a progress bar on a terminal, and else prints a line every ten seconds."""
    screen = console()
    if not screen.is_terminal:
        last = time.monotonic()

        def plain(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10 or done == total:
                last = time.monotonic()
                screen.print(f"{what} {done}/{total}", highlight=False)

        yield plain
        return
    from rich.progress import Progress

    with Progress(console=screen) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
