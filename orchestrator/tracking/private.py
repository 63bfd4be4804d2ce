"""Every private name of MLflow that this project uses, and why. `tests/orchestrator/tracking/test_private.py` checks them.

`SystemMetricsMonitor` records the load of the driver's machine. The public way, `mlflow.start_run(log_system_metrics=True)`,
makes the run the active one of the whole process, reads the process-wide tracking URI, and ends the run at exit.

`SHARED_VIEW_TAG` begins the tag of an experiment under which MLflow's pages store a shared view of the table of runs. There
is no public call for it.
"""

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

__all__ = ["SHARED_VIEW_TAG", "SystemMetricsMonitor"]

SHARED_VIEW_TAG = "mlflow.sharedViewState."
