"""Names the entries of figures, by tracking key: `with_interval` adds an interval's ends, `under` a prefix."""

from collections.abc import Mapping


def with_interval(name: str, value: float, ends: tuple[float, float]) -> dict[str, float]:
    """`{name: value, name_low: …, name_high: …}`: a figure and the ends of its 95 % interval."""
    return {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def under(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The same figures with `prefix/` before each name."""
    return {f"{prefix}/{name}": value for name, value in figures.items()}
