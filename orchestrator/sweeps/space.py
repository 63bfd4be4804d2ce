"""The search space of a sweep: draws points, and passes the domains to Optuna or a grid."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.experiments.domains import ChoiceConfig, DomainConfig, GridConfig, Point
from workloads.errors import ConfigError

_REDRAWS = 200  # of a point that was drawn before, as happens in small discrete spaces


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
