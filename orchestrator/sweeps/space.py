"""`SearchSpace`: the domains of a sweep. Draws random points, lists a grid, and is the search space of Optuna."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.experiments.domains import ChoiceConfig, DomainConfig, GridConfig, Point
from workloads.errors import ConfigError

_REDRAWS = 200  # of a point that was drawn before, which is likely in a small discrete space


class SearchSpace:
    """The domains of a sweep, by dotted key, over an experiment.

    Args:
        domains: the `when` of a key may name the keys before it.
        defaults: the experiment's own values by dotted key; they decide a `when` whose key is not searched.
    """

    def __init__(self, domains: Mapping[str, DomainConfig], defaults: Mapping[str, Any]) -> None:
        self.domains, self._defaults = dict(domains), dict(defaults)

    def __call__(self, trial: Any) -> None:
        """Optuna's define-by-run function: suggests the keys that are part of the point of `trial`."""
        self.suggest(trial)

    def suggest(self, trial: Any) -> Point:
        """The point of an Optuna trial."""
        point: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, point):
                point[key] = domain.suggest(key, trial)
        return point

    def decode(self, suggested: Mapping[str, Any]) -> Point:
        """The point with the values that Optuna stores for a trial."""
        return {key: domain.decode(suggested[key]) for key, domain in self.domains.items() if key in suggested}

    def encode(self, point: Point) -> dict[str, Any]:
        """The values that Optuna stores for `point`; the inverse of `decode`."""
        return {key: self.domains[key].encode(value) for key, value in point.items()}

    def baseline(self) -> Point:
        """The experiment's own values of the searched keys."""
        point: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, point):
                point[key] = self._defaults.get(key)
        return point

    def misplaced_baseline(self) -> str | None:
        """The first searched key whose own value is outside its domain, or None."""
        return next((key for key, value in self.baseline().items() if not self.domains[key].holds(value)), None)

    def random(self, count: int, *, seed: int, known: Sequence[Point] = ()) -> list[Point]:
        """`count` points other than those `known`; the n-th does not depend on `count`. Values of grids are taken in turn."""
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
        """All combinations of values, without duplicates: keys whose `when` does not hold are left out of a point.

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
            active = self._active(point)
            if active not in unique:
                unique.append(active)
        return unique

    def probes(self) -> Iterator[tuple[str, Point]]:
        """Pairs of a key and a point that must be valid: one pair for each extreme value of the key."""
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
        active: Point = {}
        for key, domain in self.domains.items():
            if self._applies(domain, active):
                active[key] = point[key]
        return active

    def _applies(self, domain: DomainConfig, point: Point) -> bool:
        return all(point.get(key, self._defaults.get(key)) == value for key, value in domain.when.items())
