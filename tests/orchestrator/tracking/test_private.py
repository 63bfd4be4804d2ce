"""The private names of MLflow that `tracking.private` uses are as they were."""

import inspect

from orchestrator.tracking.private import SystemMetricsMonitor


def test_mlflow_still_has_the_monitor_of_the_drivers_machine() -> None:
    parameters = inspect.signature(SystemMetricsMonitor).parameters
    assert {"run_id", "resume_logging", "tracking_uri"} <= set(parameters)
    assert {"start", "finish"} <= set(dir(SystemMetricsMonitor))
