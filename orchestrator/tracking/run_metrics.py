"""`log_once` adds metrics to an MLflow run after its training, without repeating or contradicting what it has."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.tracking.addresses import TrackingError
from orchestrator.tracking.sink import MUST_AGREE_TOLERANCE

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_once(client: "MlflowClient", run_id: str, metrics: Mapping[str, float], *, step: int) -> None:
    """Log the `metrics` that the run does not have at `step`.

    Raises:
        TrackingError: the run has another value there.
    """
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    fresh = []
    for key, value in metrics.items():
        history = client.get_metric_history(run_id, key) if key in known else []
        earlier = [metric.value for metric in history if metric.step == step]
        if not earlier:
            fresh.append(Metric(key, float(value), int(time.time() * 1000), step))
        elif abs(earlier[0] - value) > MUST_AGREE_TOLERANCE * max(1.0, abs(value)):
            raise TrackingError(
                f"{key} at step {step} is {value:.5f} now, but the run has {earlier[0]:.5f}, probably from another kind of "
                "machine; nothing was logged"
            )
    if fresh:
        client.log_batch(run_id, metrics=fresh)
