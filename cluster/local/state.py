"""The options and the stored state of a local cluster: `LocalOptions`, `LocalCluster`, and `find`, which reads it from a folder."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import ClusterError, ClusterRequestError

MARK = "ORCHESTRATOR_CLUSTER"
"""Environment variable of every process of a cluster; its value is the cluster's id. `down` finds the processes by it."""

BUCKET = "orchestrator"
"""Bucket that is created in the cluster's S3 store."""

LOOPBACK = "127.0.0.1"
HEAD_HOST = "127.0.0.2"
RAY_WORKER_PORTS = range(10002, 20000)
"""Ports that Ray gives to its worker processes (`--min-worker-port`, `--max-worker-port` of `ray start`)."""

_STATE = "cluster.json"
_SOCKET_PATH_LIMIT = 107  # characters of an AF_UNIX address, without the final zero byte
_LONGEST_SOCKET = len("/orchestrator-xxxxxxxx/node999/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """What `up` starts, and the ports it takes."""

    nodes: int = 2
    """Raylets that run tasks; the head is one more, and runs none."""
    cpus_per_node: int = 0
    """Logical CPUs of each raylet; 0: as many as the machine has cores."""
    store: str = "none"
    """`swift`: start an S3 store too; `none`: no object store."""
    gcs_port: int = 6379
    dashboard_port: int = 8265
    client_port: int = 10001
    mlflow_port: int = 5000
    s3_port: int = 9000
    timeout_s: float = 120.0
    """How long the services together may take to answer, seconds."""

    def ports(self) -> dict[str, tuple[str, int]]:
        """Command-line option → (host, port) of the service; Swift's inner servers take the three ports after its own."""
        taken = {
            "--gcs-port": (HEAD_HOST, self.gcs_port),
            "--dashboard-port": (LOOPBACK, self.dashboard_port),
            "--dashboard-port+1": (LOOPBACK, self.dashboard_port + 1),  # the head's agent, which takes jobs
            "--client-port": (HEAD_HOST, self.client_port),
            "--mlflow-port": (LOOPBACK, self.mlflow_port),
        }
        if self.store == "swift":
            taken |= {f"--s3-port{f'+{i}' if i else ''}": (LOOPBACK, self.s3_port + i) for i in range(4)}
        return taken

    def faults(self) -> Iterator[str]:
        """One sentence for each option that cannot work on any machine."""
        if self.store not in ("none", "swift"):
            yield f"--store {self.store}: give none or swift"
        if self.nodes < 1:
            yield f"--nodes {self.nodes}: at least one node must run tasks"
        ports = self.ports()
        often = Counter(port for _, port in ports.values())
        for option, (_, port) in ports.items():
            if not 0 < port < 65536:
                yield f"{option} {port}: a port is a number from 1 to 65535"
            elif port in RAY_WORKER_PORTS:
                first, last = RAY_WORKER_PORTS[0], RAY_WORKER_PORTS[-1]
                yield f"{option} {port}: Ray's workers use ports {first} to {last}; give one outside that range"
            elif often[port] > 1:
                yield f"{option} {port}: {often[port]} services cannot share one port"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """A cluster that `up` started, as stored in `cluster.json` of its folder."""

    id: str
    folder: str
    scratch: str
    """Folder of Ray's sessions and the sockets; deleted by `down`."""
    created: float
    boot: float
    """Boot time of the machine, seconds since the epoch: after another boot no process of the cluster is left."""
    options: LocalOptions

    @property
    def dashboard(self) -> str:
        """Address of the job API and the dashboard."""
        return f"http://{LOOPBACK}:{self.options.dashboard_port}"

    @property
    def tracking_uri(self) -> str:
        """Address of the MLflow server."""
        return f"http://{LOOPBACK}:{self.options.mlflow_port}"

    @property
    def s3_endpoint(self) -> str | None:
        """Address of the S3 store; None without one."""
        return f"http://{LOOPBACK}:{self.options.s3_port}" if self.options.store == "swift" else None

    @property
    def logs(self) -> Path:
        """Folder of the services' logs."""
        return Path(self.folder, "logs")

    @property
    def token_file(self) -> Path:
        """File with Ray's authentication token, readable by its owner only."""
        return Path(self.folder, "token")

    @property
    def environment_file(self) -> Path:
        """Shell file that sets the variables of a client: `source` it."""
        return Path(self.folder, "env.sh")

    @property
    def store_keys_file(self) -> Path:
        """AWS credentials file of the S3 store, readable by its owner only."""
        return Path(self.folder, "s3-credentials")

    def services_environment(self) -> dict[str, str]:
        """Variables by which a client or a job reaches MLflow and the S3 store."""
        variables = {"MLFLOW_TRACKING_URI": self.tracking_uri}
        if self.s3_endpoint is not None:
            variables |= {
                "AWS_ENDPOINT_URL": self.s3_endpoint,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_SHARED_CREDENTIALS_FILE": str(self.store_keys_file),
            }
        return variables

    def environment(self) -> dict[str, str]:
        """Variables of a client of the cluster."""
        return {
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            **self.services_environment(),
        }


def default_folder() -> Path:
    """The folder of this user's cluster, if none is named."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "orchestrator", "cluster")


def find(folder: Path) -> LocalCluster | None:
    """The cluster that `up` started in `folder`, running or not; None if there is none.

    Raises:
        ClusterError: its state file cannot be read.
    """
    try:
        stored = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return LocalCluster(**{**stored, "options": LocalOptions(**stored["options"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ClusterError(f"{folder / _STATE} cannot be read ({error}); delete it if the cluster is gone") from None


def write_state(cluster: LocalCluster) -> None:
    """Store `cluster` in its folder."""
    write_private(Path(cluster.folder, _STATE), json.dumps(asdict(cluster), indent=1))


def remove_state(cluster: LocalCluster) -> None:
    """Delete the stored state, so that `find` returns None."""
    Path(cluster.folder, _STATE).unlink(missing_ok=True)


def make_scratch_folder() -> str:
    """Create a folder for Ray's sessions whose sockets' paths fit into 107 characters, in TMPDIR if that is short enough.

    Raises:
        ClusterRequestError: no temporary folder is short enough.
    """
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(parent)) + _LONGEST_SOCKET <= _SOCKET_PATH_LIMIT and os.access(parent, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="orchestrator-", dir=parent)
    raise ClusterRequestError(
        f"TMPDIR {tempfile.gettempdir()}: its path is too long for Ray's sockets, and /tmp cannot be written; "
        f"set TMPDIR to a folder of at most {_SOCKET_PATH_LIMIT - _LONGEST_SOCKET} characters"
    )


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from the first byte."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
