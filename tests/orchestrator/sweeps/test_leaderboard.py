"""Ranking, the table, the importance of knobs, and comparisons, on trials made by hand."""

import csv
import io

import numpy as np
import pytest

from orchestrator.sweeps.comparison import Comparison, SuiteComparison
from orchestrator.sweeps.leaderboard import common_step, importance, leaderboard_rows, ranked, to_csv
from orchestrator.sweeps.stages import score_of
from orchestrator.sweeps.trial_result import TrialResult
from workloads.evaluation.tables import hits_of

RANK_BY = ("eval/sga", "eval/photometric/sga")


def trial(name: str, scores: dict[int, float], **changes) -> TrialResult:
    """Both metrics lie 0.1 around the score."""
    evaluations = {s: {"eval/sga": v + 0.1, "eval/photometric/sga": v - 0.1} for s, v in scores.items()}
    given = {"point": {"t": 1}, "experiment": None, "ended": True, **changes}
    return TrialResult(run_name=name, evaluations=evaluations, rank_by=RANK_BY, **given)


def test_the_score_is_the_mean_and_none_where_a_metric_is_missing():
    assert score_of({"eval/sga": 0.2, "eval/photometric/sga": 0.4}, RANK_BY) == pytest.approx(0.3)
    assert score_of({"eval/sga": 0.2}, RANK_BY) is None


def test_further_goes_before_better_and_failed_ones_stand_last():
    stopped = trial("stopped", {10: 0.9}, ended=False)
    failed = trial("failed", {10: 0.95, 20: 0.99}, ended=False, reason="out of memory")
    never = trial("never", {}, ended=False, reason="a bad value")
    good, better = trial("good", {10: 0.1, 20: 0.2}), trial("better", {10: 0.05, 20: 0.3})
    order = [t.run_name for t in ranked([never, failed, stopped, good, better])]
    assert order == ["better", "good", "stopped", "failed", "never"]
    assert [t.outcome for t in (stopped, failed, good)] == ["stopped early", "failed", "finished"]
    assert common_step([never, stopped, good, better]) == 10
    assert common_step([never]) == 0 == common_step([])


def test_the_table_has_every_knob_and_the_csv_can_be_read_again():
    rows = leaderboard_rows(
        ranked([trial("a", {10: 0.3}, point={"t": 0.1, "levels": ["P3"]}), trial("b", {10: 0.2}, point={"t": 0.2})])
    )
    assert [row["run"] for row in rows] == ["a", "b"]
    assert rows[0]["eval/sga"] == pytest.approx(0.4) and rows[0]["score at step 10"] == pytest.approx(0.3)
    assert rows[1]["levels"] is None
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert read[0]["levels"] == '["P3"]' and read[1]["levels"] == "" and float(read[1]["score"]) == pytest.approx(0.2)


def test_importance_finds_the_knob_that_matters():
    rng = np.random.default_rng(0)
    trials = []
    for i in range(40):
        point = {
            "matters": float(rng.uniform()),
            "name": str(rng.choice(["x", "y"])),
            "not_always": None if i % 2 else 3,
        }
        trials.append(trial(str(i), {10: point["matters"] + (0.2 if point["name"] == "y" else 0.0)}, point=point))
    found = importance(trials, ["matters", "name", "not_always"], seed=0)
    assert sum(found.values()) == pytest.approx(1)
    assert found["matters"] > found["name"] > 5 * found["not_always"]


def test_importance_is_silent_without_enough_trials_or_differences():
    assert importance([trial(str(i), {10: 0.1 * i}) for i in range(3)], ["t"], seed=0) == {}
    assert importance([trial(str(i), {10: 0.1}, point={"t": i}) for i in range(8)], ["t"], seed=0) == {}


def test_a_comparison_is_won_only_beyond_the_interval_in_both_suites():
    def suite(low: float) -> SuiteComparison:
        return SuiteComparison(
            winner=(0.4, 0.5), baseline=(0.3,), difference=0.1, low=low, high=0.2, pixel=0.2, chance=0.04
        )

    one, other = [trial("a", {10: 0.4})], [trial("b", {10: 0.3})]
    won = Comparison(suites={"plain": suite(0.01), "photometric": suite(0.01)}, winner=one, baseline=other)
    drawn = Comparison(suites={"plain": suite(0.01), "photometric": suite(-0.01)}, winner=one, baseline=other)
    assert won.better and not drawn.better
    assert won.lines()[0] == (
        "plain: winner 45.0%, baseline 30.0%, paired difference +10.0 [+1.0, +20.0]; pixel 20.0%, chance 4.0%"
    )


def test_hits_are_read_without_unpickling():
    text = io.BytesIO()
    np.savez_compressed(text, **{"plain/sga": np.eye(3) > 0, "photometric/sga": np.eye(3) > 1})
    assert hits_of(text.getvalue())["plain"].mean() == pytest.approx(1 / 3)
    evil = io.BytesIO()
    np.savez_compressed(evil, **{"plain/sga": np.asarray([{}], dtype=object), "photometric/sga": np.eye(3)})
    with pytest.raises(ValueError, match="allow_pickle"):
        hits_of(evil.getvalue())
