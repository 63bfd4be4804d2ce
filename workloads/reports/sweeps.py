"""Draws a sweep: points as lines over parallel axes coloured by score, and the score over each parameter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK, _PALE = "#222222", "#9a9a9a"
_LABEL = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
_LOG_RANGE = 10.0  # a numeric knob whose values span more than this is drawn on a logarithmic axis

ScoredPoint = tuple[Mapping[str, Any], float]


class _Axis:
    """Positions of one parameter's values between 0 and 1."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [value for value in values if value is not None]
        self.is_numeric = bool(known) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in known
        )
        distinct: list[Any] = sorted(set(known)) if self.is_numeric else sorted({_text(v) for v in known}, key=_natural)
        self._distinct = distinct
        # Few distinct numbers are levels of a choice, and stand at equal distances like names.
        self.is_numeric = self.is_numeric and len(distinct) > 5
        self.is_log = self.is_numeric and distinct[0] > 0 and distinct[-1] / distinct[0] >= _LOG_RANGE

    def place(self, value: Any) -> float:
        """Position of `value`; NaN for a key that the point does not have."""
        if value is None:
            return float("nan")
        if not self.is_numeric:
            index = self._distinct.index(value if value in self._distinct else _text(value))
            return index / max(1, len(self._distinct) - 1) if len(self._distinct) > 1 else 0.5
        low, high = self._scaled(self._distinct[0]), self._scaled(self._distinct[-1])
        return (self._scaled(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and their labels."""
        if not self.is_numeric:
            return [(self.place(value), value if isinstance(value, str) else f"{value:g}") for value in self._distinct]
        low, high = self._scaled(self._distinct[0]), self._scaled(self._distinct[-1])
        shown = np.linspace(low, high, 5)
        return [((s - low) / (high - low), f"{10**s if self.is_log else s:.3g}") for s in shown]

    def _scaled(self, value: float) -> float:
        return float(np.log10(value)) if self.is_log else float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _natural(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def _jitter(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.015, 0.015, count)


def draw_parallel_coordinates(points: Sequence[ScoredPoint], knobs: Sequence[str], target: Path, *, title: str) -> None:
    """One line a trial through its values and its score; the best are dark and on top."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    axes = [_Axis([point.get(knob) for point, _ in points]) for knob in knobs]
    scores = np.asarray([score for _, score in points], dtype=np.float64)
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 1.0)
    span = (high - low) or 1.0
    figure = Figure(figsize=(2.4 * (len(knobs) + 1) + 0.8, 4.6), layout="constrained")
    plot = figure.subplots()
    colors = colormaps["viridis_r"]
    jitter = _jitter(len(points))
    for rank, i in enumerate(np.argsort(scores)):
        point, share = points[i][0], (scores[i] - low) / span
        heights = [axis.place(point.get(knob)) for axis, knob in zip(axes, knobs, strict=True)]
        heights = [h if axis.is_numeric else h + jitter[i] for axis, h in zip(axes, heights, strict=True)]
        is_best = rank == len(scores) - 1
        plot.plot(
            range(len(knobs) + 1),
            [*heights, share],
            color=colors(0.1 + 0.9 * share),
            linewidth=2.6 if is_best else 1.3,
            alpha=1.0 if is_best else 0.75,
            zorder=2 + rank,
        )
    for i, axis in enumerate(axes):
        plot.axvline(i, color=_PALE, linewidth=0.8, zorder=1)
        for height, label in axis.ticks():
            plot.annotate(
                label,
                (i, height),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                size=8,
                bbox=_LABEL,
                zorder=999,
            )
    plot.axvline(len(knobs), color=_PALE, linewidth=0.8, zorder=1)
    for share in np.linspace(0, 1, 5):
        label = f"{low + share * span:.3f}"
        plot.annotate(label, (len(knobs), share), xytext=(5, 0), textcoords="offset points", va="center", size=8)
    plot.set_xticks(range(len(knobs) + 1), [*(knob.rpartition(".")[2] for knob in knobs), "score"])
    plot.set_xlim(-0.35, len(knobs) + 0.3)
    plot.set_ylim(-0.06, 1.06)
    plot.set_yticks([])
    plot.tick_params(length=0)
    for side in plot.spines.values():
        side.set_visible(False)
    figure.suptitle(f"{len(points)} trials, {title}", size=9, x=0.01, ha="left")
    figure.savefig(target, dpi=130)


def draw_effects(
    points: Sequence[ScoredPoint],
    knobs: Sequence[str],
    importance: Mapping[str, float],
    target: Path,
    *,
    title: str,
) -> None:
    """For each knob every trial's score over its value, the mean of each level, and the knob's share of the importance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(knobs) + 0.4, 3.6), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(knobs), sharey=True))
    for plot, knob in zip(plots, knobs, strict=True):
        axis = _Axis([point.get(knob) for point, _ in points])
        places = np.asarray([axis.place(point.get(knob)) for point, _ in points])
        scores = np.asarray([score for _, score in points], dtype=np.float64)
        plot.scatter(places, scores, s=26, color=_INK, alpha=0.65, linewidths=0, zorder=3)
        if not axis.is_numeric:
            for height, _ in axis.ticks():
                level = scores[np.isclose(places, height)]
                plot.hlines(level.mean(), height - 0.06, height + 0.06, color="#c0392b", linewidth=2.2, zorder=4)
        plot.set_xticks(*zip(*axis.ticks(), strict=True)) if axis.ticks() else None
        plot.set_xlim(-0.12, 1.12)
        share = f"importance {importance[knob]:.0%}" if knob in importance else "importance unknown"
        plot.set_title(f"{knob}\n{share}", size=9)
        plot.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        plot.tick_params(labelsize=8)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
    plots[0].set_ylabel("score", size=9)
    figure.suptitle(f"{len(points)} trials, {title}; red: mean of a level", size=9, x=0.01, ha="left")
    figure.savefig(target, dpi=130)
