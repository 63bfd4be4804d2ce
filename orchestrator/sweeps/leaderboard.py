"""What a sweep found: its trials in order, what each knob did, and the winner against the start."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.experiments.domains import Point
from orchestrator.experiments.spec import TrainExperiment
from orchestrator.sweeps.stages import score_of

_TREES, _SHUFFLES = 300, 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial, from its own record."""

    point: Point
    experiment: TrainExperiment | None  # None: the point's values do not go together
    run_name: str
    evaluations: Mapping[int, Mapping[str, float]]  # step → metrics
    rank_by: tuple[str, ...]
    reason: str | None = None  # why it failed
    ended: bool = False  # it ran to its end
    interrupted: bool = False  # the sweep ended before it did
    seconds: float = 0.0  # from its start to its last report

    @property
    def step(self) -> int:
        """The last step at which it was measured; 0 if it never was."""
        return max(self.evaluations, default=0)

    @property
    def score(self) -> float | None:
        """At that step."""
        return self.score_at(self.step)

    def score_at(self, step: int) -> float | None:
        """The mean of the metrics that trials are ranked by, or None."""
        return score_of(self.evaluations[step], self.rank_by) if step in self.evaluations else None

    @property
    def outcome(self) -> str:
        """How it ended: `finished`, `stopped early` by the sweep, `failed`, or `unfinished`."""
        if self.reason:
            return "failed"
        return "finished" if self.ended else "unfinished" if self.interrupted else "stopped early"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first: a trial that went further stands before one that was stopped, and failed ones stand last."""

    def place(trial: Trial) -> tuple[Any, ...]:
        return (trial.score is None, trial.outcome == "failed", -trial.step, -(trial.score or 0.0))

    return sorted(trials, key=place)


def common_step(trials: Sequence[Trial]) -> int:
    """The last step at which every trial that was measured at all was measured; 0 if there is none."""
    measured = [set(trial.evaluations) for trial in trials if trial.evaluations]
    return max(set.intersection(*measured), default=0) if measured else 0


def leaderboard_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What people see of each trial, best first; figures are those of its last evaluation, unless a step is named."""
    step = common_step(trials)
    knobs = list(dict.fromkeys(key for trial in trials for key in trial.point))
    rows = []
    for place, trial in enumerate(trials, 1):
        figures = trial.evaluations.get(trial.step, {})
        shown = [*trial.rank_by, *(k for k in ("eval/gap_r", "eval/photometric/gap_r") if k in figures)]
        rows.append(
            {
                "place": place,
                **{knob: trial.point.get(knob) for knob in knobs},
                "score": trial.score,
                f"score at step {step}": trial.score_at(step),
                **{key: figures.get(key) for key in shown},
                "step": trial.step,
                "outcome": trial.outcome,
                "minutes": round(trial.seconds / 60, 2),
                "run": trial.run_name,
                "reason": trial.reason or "",
            }
        )
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The leaderboard as CSV."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()}
        )
    return text.getvalue()


def importance(trials: Sequence[Trial], knobs: Sequence[str], *, seed: int) -> dict[str, float]:
    """How much of a fitted forest's skill each knob carries: permutation importance, as shares that sum to 1.

    The forest predicts the score at the last step that all trials have in common. Empty with fewer than four scores, or if
    shuffling no knob makes the forest worse.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    step = common_step(trials)
    scored = [(trial.point, trial.score_at(step)) for trial in trials if trial.score_at(step) is not None]
    if len(scored) < 4:
        return {}
    columns = {knob: _column([point.get(knob) for point, _ in scored]) for knob in knobs}
    x = np.stack(list(columns.values()), axis=1)
    y = np.asarray([score for _, score in scored], dtype=np.float64)
    forest = RandomForestRegressor(_TREES, random_state=seed).fit(x, y)
    found = permutation_importance(forest, x, y, n_repeats=_SHUFFLES, random_state=seed).importances_mean.clip(min=0)
    if found.sum() == 0:
        return {}
    return {knob: float(share) for knob, share in zip(columns, found / found.sum(), strict=True)}


def _column(values: Sequence[Any]) -> np.ndarray:
    """A knob's values as numbers: their own where they are numbers, else the place among the distinct ones; −1 for none."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        return np.asarray(values, dtype=np.float64)
    texts = sorted({json.dumps(value) for value in values if value is not None})
    return np.asarray([-1.0 if value is None else texts.index(json.dumps(value)) for value in values])
