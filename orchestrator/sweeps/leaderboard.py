"""Ranks the trials of a sweep: `ranked`, the table (`leaderboard_rows`, `to_csv`), and the `importance` of each searched key."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.sweeps.trial_result import TrialResult

_TREES, _SHUFFLES = 300, 30


def ranked(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Best first. A trial that ran further is placed before one that was stopped earlier; failed trials are last."""

    def order(trial: TrialResult) -> tuple[Any, ...]:
        return (trial.score is None, trial.outcome == "failed", -trial.step, -(trial.score or 0.0))

    return sorted(trials, key=order)


def common_step(trials: Sequence[TrialResult]) -> int:
    """The last step at which every trial with an evaluation has one; 0 if there is none."""
    measured = [set(trial.evaluations) for trial in trials if trial.evaluations]
    return max(set.intersection(*measured), default=0) if measured else 0


def leaderboard_rows(trials: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """One row per trial, in the given order; metrics are those of its last evaluation, except `score at step N`."""
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
    """The rows as CSV, with lists and objects as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()}
        )
    return text.getvalue()


def importance(trials: Sequence[TrialResult], knobs: Sequence[str], *, seed: int) -> dict[str, float]:
    """Permutation importance of each knob in a random forest fitted to the scores, as shares that sum to 1.

    The forest predicts the score at `common_step`. Empty with fewer than four scores, or if shuffling no knob makes the
    forest worse.
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
    losses = permutation_importance(forest, x, y, n_repeats=_SHUFFLES, random_state=seed).importances_mean.clip(min=0)
    if losses.sum() == 0:
        return {}
    return {knob: float(share) for knob, share in zip(columns, losses / losses.sum(), strict=True)}


def _column(values: Sequence[Any]) -> np.ndarray:
    """Values of one knob as numbers; values that are not numbers become their index among the sorted ones, and None −1."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        return np.asarray(values, dtype=np.float64)
    texts = sorted({json.dumps(value) for value in values if value is not None})
    return np.asarray([-1.0 if value is None else texts.index(json.dumps(value)) for value in values])
