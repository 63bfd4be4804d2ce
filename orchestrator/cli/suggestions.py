"""Suggests what was meant by an unknown command (`SuggestingGroup`) or an unknown option (`usage_fault`)."""

import difflib
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

_exceptions = sys.modules[typer.BadParameter.__module__]  # click's, or those of the copy of click inside newer typers
UsageError: type[Exception] = _exceptions.UsageError
_NoSuchOption: type[Exception] = _exceptions.NoSuchOption

_MEANT = {
    "compare": "`python -m workloads compare RUN RUN …`, or `orchestrator sweep` for a search",
    "predict": "`orchestrator export` for a file to predict with, or MLflow's `models:/NAME@champion`",
    "test": "`orchestrator evaluate`",
    "fit": "`orchestrator train`",
    "pretrain": "`orchestrator train`",
    "run": "`orchestrator train`, or `orchestrator submit` for a cluster",
    "list": "`orchestrator experiments`, or `orchestrator submit list`",
    "init": "`orchestrator data build`",
    "up": "`orchestrator cluster up local`",
    "down": "`orchestrator cluster down local`",
}
"""Commands of other tools → what this one has for the purpose."""


class SuggestingGroup(TyperGroup):
    """A group of commands that answers an unknown one with the nearest, also among the commands of its groups."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does; an unknown command is refused with a suggestion."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = {path: f"`{ctx.command_path} {path}`" for path, _ in commands_of(self)}
            ctx.fail(f"No such command {name!r}; {_did_you_mean(name, known)}")
        return super().resolve_command(ctx, args)


def _did_you_mean(name: str, known: dict[str, str]) -> str:
    if name in _MEANT:
        return f"did you mean {_MEANT[name]}?"
    leaves = {path.rpartition(" ")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(name, leaves, n=1, cutoff=0.5)
    return f"did you mean {known[leaves[close[0]]]}?" if close else f"known: {', '.join(known)}"


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below `group` with its path, as `data build`."""
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, TyperGroup):
            yield from commands_of(command, f"{prefix}{name} ")


def usage_fault(error: Exception) -> str:
    """The message of a `UsageError`; for an unknown option, with the nearest one or the commands that have it."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    if not isinstance(error, _NoSuchOption):
        return message
    option: str = error.option_name  # type: ignore[attr-defined]
    context = error.ctx  # type: ignore[attr-defined]
    own = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    close = difflib.get_close_matches(option, own, n=1)
    if close:
        return f"No such option {option}; did you mean {close[0]}?"
    root = context.find_root()
    having = [
        f"`{root.command_path} {path}`"
        for path, command in commands_of(root.command)
        if any(option in parameter.opts for parameter in command.params)
    ]
    here = ", ".join([*own, "--help"])
    there = f"did you mean {' or '.join(having[:3])}, which has it? " if having else ""
    return f"No such option {option}; {there}`{context.command_path}` has {here}"
