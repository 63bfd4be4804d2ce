"""A run on Ray's public interfaces alone, with a Ray that lacks a private name."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient

from orchestrator.cli.app import run
from orchestrator.ray_support import private


@pytest.fixture
def other_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray without one of the names that the fast paths need, and a process that has not asked yet."""
    from ray.train.v2._internal.execution import scaling_policy

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delattr(scaling_policy.ElasticScalingPolicy, "_get_reserved_resources")
    private.contract_fault.cache_clear()
    yield
    ray.shutdown()
    private.contract_fault.cache_clear()


def test_with_another_ray_a_run_ends_well_on_the_public_path_and_says_so_once(
    other_ray: None, experiment: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert run(["train", str(experiment), "tracking.run_name=public", "evaluation.uri=null"]) == 0
    said = [record.getMessage() for record in caplog.records if "fast paths" in record.getMessage()]
    assert len(said) == 1 and "ElasticScalingPolicy._get_reserved_resources is missing" in said[0]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert found.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")] == [5, 10, 15, 20]
