"""Finds a run in the tracking store by its id or its name."""

import os
import re
from pathlib import Path
from typing import Any

from orchestrator.tracking.addresses import quiet_mlflow
from workloads.errors import ConfigError


def open_tracking(tracking_uri: str | None) -> Any:
    """A client of the given MLflow store, else of MLFLOW_TRACKING_URI's, else of runs/mlflow.db.

    Raises:
        ConfigError: there is no such file.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs').absolute()}/mlflow.db"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"--tracking-uri: there is no MLflow store at {uri}; name the one that the run was logged to")
    return MlflowClient(tracking_uri=uri)


def find_run(client: Any, run: str) -> Any:
    """The MLflow run with this id, else the newest with this name.

    Raises:
        ConfigError: there is none.
    """
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run)
        except MlflowException:
            raise ConfigError(f"{run}: no run with this id in the tracking store") from None
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"attributes.run_name = '{run}'" if "'" not in run else "attributes.run_name = ''"
    found = client.search_runs(everywhere, query, order_by=["attributes.start_time DESC"], max_results=1)
    if not found:
        raise ConfigError(f"{run}: no run with this name in the tracking store")
    return found[0]
