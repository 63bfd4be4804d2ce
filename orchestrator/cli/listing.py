"""The `experiments` command: lists the experiments of the package, or every key of one."""

from typing import Annotated

import typer

from orchestrator.cli.root import app
from orchestrator.cli.terminal import Debug, explained

_ABSENT = object()


@app.command()
def experiments(
    name: Annotated[str | None, typer.Argument(help="Experiment whose keys are listed.")] = None,
    debug: Debug = False,
) -> None:
    """List the experiments of the package, or every key of one with its value, default and meaning."""
    with explained(debug):
        from orchestrator.experiments.load import has_sweep, list_experiments, load_experiment, load_sweep

        if name is None:
            for known, comment in list_experiments().items():
                typer.echo(f"{known}\n    " + comment.replace("\n", "\n    "))
            return
        from workloads.config import describe, to_dict

        experiment = load_sweep(name) if has_sweep(name) else load_experiment(name)
        for key, default, meaning in describe(type(experiment)):
            value = to_dict(experiment)
            for part in key.split("."):
                value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
            is_other_kind = key.endswith(".kind") and default != f'"{value}"'
            if value is not _ABSENT and not is_other_kind:
                typer.echo(f"{key} = {value}   [{default}]  {meaning}")
