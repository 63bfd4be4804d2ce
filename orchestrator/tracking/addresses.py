"""Addresses of the tracking store, of its artifacts and of its pages; secrets removed."""

import logging
import os
import re
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment
from workloads.errors import ConfigError, RunFailedError


class TrackingError(RunFailedError):
    """The tracking server does not do what the run needs of it."""


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
    """Where artifacts go when the tracking store is a local SQLite file; a server decides for itself."""
    is_local = tracking_uri(experiment).startswith("sqlite:") and "://" not in experiment.storage.path
    return Path(experiment.storage.path, "mlartifacts").as_uri() if is_local else None


def without_secrets(text: str) -> str:
    """`text` with the credentials taken out of its addresses."""
    return re.sub(r"://[^/@\s'\"]+@", "://", text)


def quiet_mlflow() -> None:
    """No telemetry; a dead server is reported after seconds, not minutes, because the journal does the retrying."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def page_address(uri: str, page: str) -> str:
    """Where people open a page of MLflow: on its server, or on the one that the command starts for a local store."""
    if is_server(uri):
        return f"{without_secrets(uri).rstrip('/')}/{page}"
    return f"{_local_server(uri)}   then http://127.0.0.1:5000/{page}"


def run_address(uri: str, experiment_id: str, run_id: str) -> str:
    """Where people look at the run: a server's page, or the command that opens a local store."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    return page_address(uri, page) if is_server(uri) else _local_server(uri)


def is_server(uri: str) -> bool:
    """Whether a tracking store is reached through a server of MLflow."""
    return uri.startswith(("http://", "https://"))


def _local_server(uri: str) -> str:
    return f"mlflow ui --backend-store-uri {uri}"
