"""Defines the domains of a search space (`ChoiceConfig`, `GridConfig`, `UniformConfig`, …), from which points are drawn.

A point maps dotted keys to values, as on the command line. A key with `when` is part of a point only if the other keys of the
point, or the experiment's own values, meet the condition::

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
    """One of several values, each equally likely."""

    kind: Literal["choice"] = "choice"
    """Kind of domain: choice, grid, uniform, loguniform or int."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """Values, of any type that the key accepts."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Condition: other keys, and the values they must have for this key to be part of a point."""

    def draw(self, generator: np.random.Generator) -> Any:
        """Draw a value."""
        return self.values[int(generator.integers(len(self.values)))]

    def suggest(self, name: str, trial: Any) -> Any:
        """Let an Optuna trial suggest a value."""
        return self.decode(trial.suggest_categorical(name, [self.encode(value) for value in self.values]))

    def encode(self, value: Any) -> str:
        """A value as a category of Optuna: JSON, because categories are scalars."""
        return json.dumps(value)

    def decode(self, encoded: str) -> Any:
        """The value of a category."""
        return json.loads(encoded)

    def corners(self) -> tuple[Any, ...]:
        """All values: the experiment must accept each."""
        return self.values

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the domain."""
        return value in self.values


@config
class GridConfig(ChoiceConfig):
    """Each of several values equally often, combined with the values of the other grids."""

    kind: Literal["grid"] = "grid"  # type: ignore[assignment]
    """Kind of domain: choice, grid, uniform, loguniform or int."""


@config
class UniformConfig:
    """Real numbers between `low` and `high`, uniformly distributed."""

    kind: Literal["uniform"] = "uniform"
    """Kind of domain: choice, grid, uniform, loguniform or int."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Condition: other keys, and the values they must have for this key to be part of a point."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)

    def draw(self, generator: np.random.Generator) -> float:
        """Draw a value."""
        return _rounded(generator.uniform(self.low, self.high), self.low, self.high)

    def suggest(self, name: str, trial: Any) -> float:
        """Let an Optuna trial suggest a value."""
        return self.decode(trial.suggest_float(name, self.low, self.high))

    def encode(self, value: float) -> float:
        """A value as Optuna stores it."""
        return value

    def decode(self, encoded: float) -> float:
        """The value of a suggestion, rounded."""
        return _rounded(encoded, self.low, self.high)

    def corners(self) -> tuple[Any, ...]:
        """The values at the ends; if the experiment accepts these, it accepts all."""
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the domain."""
        return _is_number(value) and self.low <= value <= self.high


@config
class LogUniformConfig(UniformConfig):
    """Positive real numbers between `low` and `high`, whose logarithm is uniformly distributed."""

    kind: Literal["loguniform"] = "loguniform"  # type: ignore[assignment]
    """Kind of domain: choice, grid, uniform, loguniform or int."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        if self.low <= 0:
            raise ConfigError(f"low: a loguniform domain must begin above 0, given {self.low}")

    def draw(self, generator: np.random.Generator) -> float:
        """Draw a value."""
        return _rounded(math.exp(generator.uniform(math.log(self.low), math.log(self.high))), self.low, self.high)

    def suggest(self, name: str, trial: Any) -> float:
        """Let an Optuna trial suggest a value."""
        return self.decode(trial.suggest_float(name, self.low, self.high, log=True))


@config
class IntConfig:
    """Whole numbers from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    """Kind of domain: choice, grid, uniform, loguniform or int."""
    low: int
    """Smallest value."""
    high: int
    """Largest value."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Condition: other keys, and the values they must have for this key to be part of a point."""

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        if self.log and self.low <= 0:
            raise ConfigError(f"low: with log it must be above 0, given {self.low}")

    def draw(self, generator: np.random.Generator) -> int:
        """Draw a value."""
        if not self.log:
            return int(generator.integers(self.low, self.high + 1))
        exponent = generator.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))
        return min(self.high, max(self.low, round(math.exp(float(exponent)))))

    def suggest(self, name: str, trial: Any) -> int:
        """Let an Optuna trial suggest a value."""
        return self.decode(trial.suggest_int(name, self.low, self.high, log=self.log))

    def encode(self, value: int) -> int:
        """A value as Optuna stores it."""
        return value

    def decode(self, encoded: int) -> int:
        """The value of a suggestion."""
        return int(encoded)

    def corners(self) -> tuple[Any, ...]:
        """The values at the ends; if the experiment accepts these, it accepts all."""
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
    """Round to four digits, short enough to read and to type."""
    return min(high, max(low, float(f"{value:.4g}")))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def take_dotted(arguments: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Separate the `key=value` arguments below `prefix`, without the prefix, from the others.

    The keys of `sweep.space` and `sweep.trial` are dotted keys themselves, so these arguments cannot be nested like the others.
    """
    ours = [argument for argument in arguments if argument.startswith(f"{prefix}.")]
    return [a.removeprefix(f"{prefix}.") for a in ours], [a for a in arguments if a not in ours]


def override_space(space: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Apply overrides to domains as in YAML: a complete domain, one of its fields, or null, which removes the key."""
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
