"""URIs of the tracking store and its artifacts, and the addresses of its pages, without credentials."""

import os
import re
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment
from workloads.errors import ConfigError, RunFailedError


class TrackingError(RunFailedError):
    """The tracking store lacks or contradicts what the command needs; the message names it."""


def tracking_uri(experiment: AnyExperiment) -> str:
    """The configured tracking URI, else MLFLOW_TRACKING_URI, else SQLite in the (local) output folder.

    Raises:
        ConfigError: the output folder is not local and no tracking URI is given.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "://" in experiment.storage.path:
        raise ConfigError(
            f"tracking.uri: needed, because storage.path {experiment.storage.path} cannot hold an SQLite file; "
            "set it or MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{experiment.storage.path}/mlflow.db"


def artifact_root(experiment: AnyExperiment) -> str | None:
    """URI of the artifacts folder for a tracking store in a local SQLite file; None for a server, which has its own."""
    is_local = tracking_uri(experiment).startswith("sqlite:") and "://" not in experiment.storage.path
    return Path(experiment.storage.path, "mlartifacts").as_uri() if is_local else None


def without_secrets(text: str) -> str:
    """`text` without the credentials in its URLs."""
    return re.sub(r"://[^/@\s'\"]+@", "://", text)


def page_address(uri: str, page: str) -> str:
    """Address of a page of MLflow; for a local store, the command that serves it and the address then."""
    if is_server(uri):
        return f"{without_secrets(uri).rstrip('/')}/{page}"
    return f"{_local_server(uri)}   then http://127.0.0.1:5000/{page}"


def run_address(uri: str, experiment_id: str, run_id: str) -> str:
    """Address of a run's page; for a local store, the command that serves it."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    return page_address(uri, page) if is_server(uri) else _local_server(uri)


def is_server(uri: str) -> bool:
    """Whether `uri` is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def _local_server(uri: str) -> str:
    return f"mlflow ui --backend-store-uri {uri}"
