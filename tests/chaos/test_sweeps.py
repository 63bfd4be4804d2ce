"""A real sweep that learns: too long for every commit."""

import csv
from pathlib import Path

import pytest

from orchestrator.cli import run
from tests.orchestrator.conftest import datasets
from tests.orchestrator.test_sweep import write_sweep

__all__ = ["datasets"]


@pytest.mark.short
def test_optuna_with_median_stopping_over_trials_of_two_workers(tmp_path: Path, datasets: dict[str, str]):
    path = write_sweep(tmp_path, datasets)
    given = [
        *("sweep.searcher={kind: optuna, random_trials: 1}", "sweep.stopper={kind: median, first_step: 4}"),
        *("sweep.space.micro_batch_size=null", "sweep.space.backbone.norm=null", "sweep.final_seeds=0"),
        "sweep.space.objective.temperature={kind: loguniform, low: 0.05, high: 0.5}",
        *("sweep.trials=3", "scaling.num_workers=2", "tracking.run_name=optuna"),
    ]
    assert run(["sweep", str(path), *given]) == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "optuna" / "report" / "leaderboard.csv").read_text().splitlines()))
    assert len(rows) == 3 and all(row["outcome"] in ("finished", "stopped early") for row in rows)
    assert "0.1" in [row["objective.temperature"] for row in rows]  # the start, asked for first
    assert len({row["objective.temperature"] for row in rows}) == 3
    assert all(0.05 <= float(row["objective.temperature"]) <= 0.5 for row in rows)
