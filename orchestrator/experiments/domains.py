"""What a sweep varies: domains by dotted key, and the points that are tried.

A point is a mapping from dotted keys to values, as on the command line. A key with `when` is part of a point only where
the other keys, or the experiment's own values, say so::

    optimizer.kind: {kind: choice, values: [adamw, sgd]}
    optimizer.momentum: {kind: uniform, low: 0.8, high: 0.99, when: {optimizer.kind: sgd}}
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from workloads.config import ConfigError, config

Point = dict[str, Any]

_REDRAWS = 200  # of a point that was drawn before, as happens in small discrete spaces


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


class SearchSpace:
    """The domains of a sweep over an experiment's values.

    Args:
        domains: by dotted key; a key's `when` may name keys that stand before it.
        defaults: the experiment's own values by dotted key, which decide a `when` that no swept key decides.
    """

    def __init__(self, domains: Mapping[str, DomainConfig], defaults: Mapping[str, Any]) -> None:
        self.domains, self._defaults = dict(domains), dict(defaults)

    def __call__(self, trial: Any) -> None:
        """Optuna's define-by-run function: asks `trial` for the keys that are part of its point."""
        self.suggest(trial)

    def suggest(self, trial: Any) -> Point:
        """The point that an Optuna trial stands for."""
        point: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, point):
                point[key] = domain.suggest(key, trial)
        return point

    def decode(self, suggested: Mapping[str, Any]) -> Point:
        """The point of what Optuna remembers of a trial."""
        return {key: domain.decode(suggested[key]) for key, domain in self.domains.items() if key in suggested}

    def encode(self, point: Point) -> dict[str, Any]:
        """What Optuna is told of a point; the inverse of `decode`."""
        return {key: self.domains[key].encode(value) for key, value in point.items()}

    def start(self) -> Point:
        """The experiment's own values of the swept keys."""
        point: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, point):
                point[key] = self._defaults.get(key)
        return point

    def misplaced_start(self) -> str | None:
        """The first swept key whose own value is outside its domain."""
        return next((key for key, value in self.start().items() if not self.domains[key].holds(value)), None)

    def random(self, count: int, *, seed: int, known: Sequence[Point] = ()) -> list[Point]:
        """`count` points other than those `known`; the n-th does not depend on how many there are. Grids are gone through in turn."""
        grids = list(self._crossed({k: d for k, d in self.domains.items() if isinstance(d, GridConfig)}))
        points: list[Point] = []
        for number in range(count):
            for redraw in range(_REDRAWS):
                generator = np.random.default_rng([seed, number, redraw])
                point = self._drawn(generator, grids[number % len(grids)])
                if point not in points and point not in known:
                    break
            points.append(point)
        return points

    def grid(self) -> list[Point]:
        """All combinations, those that differ only in keys that are not part of them counted once.

        Raises:
            ConfigError: a domain is not a list of values.
        """
        for key, domain in self.domains.items():
            if not isinstance(domain, ChoiceConfig):
                raise ConfigError(
                    f"sweep.space.{key}: a grid needs kind: grid or choice with values, given {domain.kind}"
                )
        unique: list[Point] = []
        for point in self._crossed(self.domains):
            kept = self._active(point)
            if kept not in unique:
                unique.append(kept)
        return unique

    def probes(self) -> Iterator[tuple[str, Point]]:
        """Each key with points of which all must be valid: its extreme values, where its `when` lets it be set."""
        for key, domain in self.domains.items():
            for value in domain.corners():
                yield key, {**domain.when, key: value}

    def _crossed(self, domains: Mapping[str, Any]) -> Iterator[Point]:
        for values in itertools.product(*(domain.values for domain in domains.values())):
            yield dict(zip(domains, values, strict=True))

    def _drawn(self, generator: np.random.Generator, fixed: Point) -> Point:
        drawn = {key: fixed[key] if key in fixed else domain.draw(generator) for key, domain in self.domains.items()}
        return self._active(drawn)

    def _active(self, point: Point) -> Point:
        kept: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, kept):
                kept[key] = point[key]
        return kept

    def _applies(self, domain: Any, point: Point) -> bool:
        return all(point.get(key, self._defaults.get(key)) == value for key, value in domain.when.items())


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
