"""Option records: `takes_options` gives a command one dataclass in place of one parameter for each option."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def takes_options(record: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that typer reads the fields of `record` as its options, and `options` receives the record.

    The fields are annotated as typer's parameters are: `name: Annotated[int, typer.Option(help="…")] = 2`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = {field.name for field in dataclasses.fields(record)}

        def command(**values: Any) -> None:
            own = {name: values.pop(name) for name in fields}
            function(options=record(**own), **values)

        hints = {**get_type_hints(function, include_extras=True), **get_type_hints(record, include_extras=True)}
        del hints["options"]
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
        parameters += inspect.signature(record).parameters.values()
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in parameters]
        )
        command.__annotations__ = hints
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate
