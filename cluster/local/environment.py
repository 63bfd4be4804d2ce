"""Chooses the environment variables of a local cluster's processes, and writes those of its clients as a shell file."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.local.state import MARK, LocalCluster, write_private

_NOT_INHERITED = ("AWS_", "MLFLOW_", "RAY_")
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")


def service_environment(cluster: LocalCluster, extra: Mapping[str, str]) -> dict[str, str]:
    """Variables of the supervisor, inherited by all services: this process's without the user's secrets, and the cluster's own."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_NOT_INHERITED) and not any(part in key.upper() for part in _SECRET_NAMES)
    }
    return {
        **inherited,
        MARK: cluster.id,
        "SPT_NOENV": "1",  # Ray's processes set their titles; without this the title overwrites the environment, and the mark
        "PATH": f"{Path(sys.executable).parent}:{inherited.get('PATH', os.defpath)}",  # jobs call `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # its handlers can hang the servers that Ray forks for clients (ray issue 63202)
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes that nothing here uses
        **extra,
    }


def write_client_environment(cluster: LocalCluster) -> None:
    """Write `env.sh`, which exports the variables of a client."""
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in cluster.environment().items())
    write_private(cluster.environment_file, exports)
