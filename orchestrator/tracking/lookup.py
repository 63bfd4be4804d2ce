"""`open_tracking` opens a tracking store, `find_run` finds a run in it by its id or name."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.tracking.client import quiet_mlflow
from workloads.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def open_tracking(tracking_uri: str | None) -> "MlflowClient":
    """A client of the store at `tracking_uri`, else at MLFLOW_TRACKING_URI, else of runs/mlflow.db.

    Raises:
        ConfigError: the store is an SQLite file that does not exist.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs').absolute()}/mlflow.db"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"--tracking-uri: there is no MLflow store at {uri}; name the one that the run was logged to")
    return MlflowClient(tracking_uri=uri)


def find_run(client: "MlflowClient", run: str) -> "Run":
    """The MLflow run with this id, or the newest with this name.

    Raises:
        ConfigError: no run has it.
    """
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run)
        except MlflowException:
            raise ConfigError(f"{run}: no run with this id in the tracking store") from None
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"attributes.run_name = '{run}'" if "'" not in run else "attributes.run_name = ''"
    matches = client.search_runs(everywhere, query, order_by=["attributes.start_time DESC"], max_results=1)
    if not matches:
        raise ConfigError(f"{run}: no run with this name in the tracking store")
    return matches[0]
