"""MLflow's state of the whole process is as it was after a call that needs it changed."""

import os

import mlflow
import pytest

from orchestrator.tracking.client import global_tracking_uri


@pytest.mark.parametrize("variable", [None, "sqlite:////tmp/other.db"])
def test_the_global_tracking_uri_is_restored(monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    if variable is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    before = mlflow.get_tracking_uri()
    with pytest.raises(RuntimeError), global_tracking_uri("sqlite:////tmp/mine.db"):
        with global_tracking_uri("sqlite:////tmp/nested.db"):
            assert mlflow.get_tracking_uri() == "sqlite:////tmp/nested.db"
        assert mlflow.get_tracking_uri() == "sqlite:////tmp/mine.db"
        raise RuntimeError
    assert mlflow.get_tracking_uri() == before
    assert os.environ.get("MLFLOW_TRACKING_URI") == variable
    assert mlflow.is_tracking_uri_set() == (variable is not None)
