"""What the commands share: options, the console, errors in words, counters."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Dotted keys to override.")]
Run = Annotated[str, typer.Argument(help="MLflow run id, or run name.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store; default: MLFLOW_TRACKING_URI, else runs/mlflow.db.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the workers' own output.")]


@contextlib.contextmanager
def explained(debug: bool) -> Iterator[None]:
    """Turn the errors that a user can cause into one sentence and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except Exception as error:
        if debug:
            raise
        code = getattr(error, "exit_code", None)  # of `UserError`, and of the clusters' own error
        text = " ".join(str(error).split())
        typer.echo(f"error: {text if code else f'{text or type(error).__name__} (--debug shows where)'}", err=True)
        raise typer.Exit(code or 1) from None


def console() -> Any:
    from rich.console import Console

    return Console()


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, else a line every ten seconds."""
    shown = console()
    if not shown.is_terminal:
        last = time.monotonic()

        def plain(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10 or done == total:
                last = time.monotonic()
                shown.print(f"{what} {done}/{total}", highlight=False)

        yield plain
        return
    from rich.progress import Progress

    with Progress(console=shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
