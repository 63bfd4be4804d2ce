"""What a sweep varies: domains by dotted key, and the points that are tried.

A point is a mapping from dotted keys to values, as on the command line. A key with `when` is part of a point only where
the other keys, or the experiment's own values, say so::

    optimizer.kind: {kind: choice, values: [adamw, sgd]}
    optimizer.momentum: {kind: uniform, low: 0.8, high: 0.99, when: {optimizer.kind: sgd}}
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from workloads.config import config
from workloads.errors import ConfigError

Point = dict[str, Any]


@config
class ChoiceConfig:
    """One of some values."""

    kind: Literal["choice"] = "choice"
    """Kind of domain."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """The values, of any type that the key takes."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Other keys and the values they must have for this key to be part of a point."""

    def draw(self, generator: np.random.Generator) -> Any:
        """A value."""
        return self.values[int(generator.integers(len(self.values)))]

    def suggest(self, name: str, trial: Any) -> Any:
        """A value from an Optuna trial."""
        return self.decode(trial.suggest_categorical(name, [self.encode(value) for value in self.values]))

    def encode(self, value: Any) -> str:
        """What Optuna is told of a value: JSON, because its categories are scalars."""
        return json.dumps(value)

    def decode(self, told: str) -> Any:
        """The value that Optuna was told of."""
        return json.loads(told)

    def corners(self) -> tuple[Any, ...]:
        """Values that must all be valid for the domain to be."""
        return self.values

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the domain."""
        return value in self.values


@config
class GridConfig(ChoiceConfig):
    """Each of some values as often as the others, crossed with the other grids."""

    kind: Literal["grid"] = "grid"  # type: ignore[assignment]
    """Kind of domain."""


@config
class UniformConfig:
    """Real numbers."""

    kind: Literal["uniform"] = "uniform"
    """Kind of domain."""
    low: float
    """The least."""
    high: float
    """The largest."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Other keys and the values they must have for this key to be part of a point."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)

    def draw(self, generator: np.random.Generator) -> float:
        """A value."""
        return _rounded(generator.uniform(self.low, self.high), self.low, self.high)

    def suggest(self, name: str, trial: Any) -> float:
        """A value from an Optuna trial."""
        return self.decode(trial.suggest_float(name, self.low, self.high))

    def encode(self, value: float) -> float:
        """What Optuna is told of a value."""
        return value

    def decode(self, told: float) -> float:
        """The value that is meant by what Optuna suggests."""
        return _rounded(told, self.low, self.high)

    def corners(self) -> tuple[Any, ...]:
        """Values that must all be valid for the domain to be."""
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the domain."""
        return _is_number(value) and self.low <= value <= self.high


@config
class LogUniformConfig(UniformConfig):
    """Positive real numbers, uniform in their logarithm."""

    kind: Literal["loguniform"] = "loguniform"  # type: ignore[assignment]
    """Kind of domain."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        if self.low <= 0:
            raise ConfigError(f"low: a loguniform domain begins above 0, given {self.low}")

    def draw(self, generator: np.random.Generator) -> float:
        """A value."""
        return _rounded(math.exp(generator.uniform(math.log(self.low), math.log(self.high))), self.low, self.high)

    def suggest(self, name: str, trial: Any) -> float:
        """A value from an Optuna trial."""
        return self.decode(trial.suggest_float(name, self.low, self.high, log=True))


@config
class IntConfig:
    """Whole numbers, both ends included."""

    kind: Literal["int"] = "int"
    """Kind of domain."""
    low: int
    """The least."""
    high: int
    """The largest."""
    log: bool = False
    """Uniform in the logarithm."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Other keys and the values they must have for this key to be part of a point."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        if self.log and self.low <= 0:
            raise ConfigError(f"low: with log it must be above 0, given {self.low}")

    def draw(self, generator: np.random.Generator) -> int:
        """A value."""
        if not self.log:
            return int(generator.integers(self.low, self.high + 1))
        exponent = generator.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))
        return min(self.high, max(self.low, round(math.exp(float(exponent)))))

    def suggest(self, name: str, trial: Any) -> int:
        """A value from an Optuna trial."""
        return self.decode(trial.suggest_int(name, self.low, self.high, log=self.log))

    def encode(self, value: int) -> int:
        """What Optuna is told of a value."""
        return value

    def decode(self, told: int) -> int:
        """The value that is meant by what Optuna suggests."""
        return int(told)

    def corners(self) -> tuple[Any, ...]:
        """Values that must all be valid for the domain to be."""
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the domain."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


DomainConfig = Annotated[
    ChoiceConfig | GridConfig | UniformConfig | LogUniformConfig | IntConfig, Field(discriminator="kind")
]


def _check_order(low: float, high: float) -> None:
    if not low < high:
        raise ConfigError(f"low: must be below high, given {low} and {high}")


def _rounded(value: float, low: float, high: float) -> float:
    """Four digits, which people can read and type again."""
    return min(high, max(low, float(f"{value:.4g}")))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def take_dotted(arguments: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Divide `key=value` arguments into those below `prefix`, which is taken off, and the others.

    Below `sweep.space` and `sweep.trial` stand dotted keys, so these arguments cannot be nested like the others.
    """
    ours = [argument for argument in arguments if argument.startswith(f"{prefix}.")]
    return [a.removeprefix(f"{prefix}.") for a in ours], [a for a in arguments if a not in ours]


def override_space(space: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Domains as they stand in YAML with overrides: a whole domain, one of its fields, or null, which takes the key out."""
    result: dict[str, Any] = {key: dict(domain) for key, domain in space.items()}
    for key, value in overrides.items():
        owner = next((known for known in result if key.startswith(f"{known}.")), None)
        if value is None:
            result.pop(key, None)
        elif owner is not None and not isinstance(value, dict):
            result[owner][key.removeprefix(f"{owner}.")] = value
        else:
            result[key] = value
    return result
