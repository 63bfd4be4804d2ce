"""Sets MLflow up in this process: `quiet_mlflow`, and `global_tracking_uri` for the calls that accept no tracking URI."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_global_uri = threading.RLock()


def quiet_mlflow() -> None:
    """Turn off MLflow's telemetry and messages, and let a dead server be noticed in seconds: the journal does the retrying.

    MLflow reads these settings from environment variables alone, at every request. Values that the user has set stay.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # MLflow reads its level once, when it is imported, which may have been before.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


@contextlib.contextmanager
def global_tracking_uri(uri: str) -> Iterator[None]:
    """Make `uri` the tracking URI of the process, which MLflow's calls on models use whatever client they are given.

    The earlier state, MLFLOW_TRACKING_URI included, is restored at the end. Other threads that want another URI wait.
    """
    import mlflow

    with _global_uri:
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # back to what the variable says
            if before is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before
