"""A cluster on this machine: real raylets, an MLflow server and an S3 store, each a supervised process, all on loopback.

Every raylet has a loopback address of its own, 127.0.0.2 and on: Ray tells nodes apart by address, and two on one address
get each other's node and local ranks, and unpack a job's files over each other.

supervisord watches the processes. Each of them, and whatever they start, has `MARK` in its environment or writes below the
cluster's scratch folder, by which `down` finds what `up` started even where supervisord was killed; nothing else is ever stopped.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import swift

MARK = "ORCHESTRATOR_CLUSTER"
"""Variable by which a process is known to belong to a cluster; its value is the cluster's id."""

BUCKET = "orchestrator"

_STATE = "cluster.json"
_HEAD_HOST = "127.0.0.2"
_LOOPBACK = "127.0.0.1"
_NODE_GIB, _SERVICES_GIB = 0.35, 1.2  # measured: a raylet with its agents; GCS, dashboard, MLflow's server and Swift
_NOT_INHERITED = ("AWS_", "MLFLOW_", "RAY_")
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")
_STOP_S = 20.0


class ClusterError(RuntimeError):
    """The cluster cannot be started, reached or stopped; the message says why and what to do."""

    exit_code = 1  # of the command that ends with it


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """What `up` brings up."""

    nodes: int = 2
    """Raylets that take work, beside the head, which takes none."""
    cpus_per_node: int = 0
    """Logical CPUs of each; 0 is the machine's cores."""
    store: str = "none"
    """`swift` for an S3 store; `none` where plain folders do."""
    gcs_port: int = 6379
    dashboard_port: int = 8265
    client_port: int = 10001
    mlflow_port: int = 5000
    s3_port: int = 9000
    timeout_s: float = 120.0

    def ports(self) -> dict[str, tuple[str, int]]:
        """Option → the address that its service takes; Swift's inner servers use the three ports after its own."""
        taken = {
            "--gcs-port": (_HEAD_HOST, self.gcs_port),
            "--dashboard-port": (_LOOPBACK, self.dashboard_port),
            "--dashboard-port+1": (_LOOPBACK, self.dashboard_port + 1),  # the head's agent, which takes jobs
            "--client-port": (_HEAD_HOST, self.client_port),
            "--mlflow-port": (_LOOPBACK, self.mlflow_port),
        }
        if self.store == "swift":
            taken |= {f"--s3-port{f'+{i}' if i else ''}": (_LOOPBACK, self.s3_port + i) for i in range(4)}
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """What is known of a cluster that `up` started; kept in its folder."""

    id: str
    folder: str
    scratch: str  # short, because sockets lie there: a path to one has at most 107 characters
    created: float
    boot: float  # of the machine; after another boot nothing of this runs
    options: LocalOptions

    @property
    def dashboard(self) -> str:
        """Address of the job API and the dashboard."""
        return f"http://{_LOOPBACK}:{self.options.dashboard_port}"

    @property
    def tracking_uri(self) -> str:
        """Address of MLflow's server."""
        return f"http://{_LOOPBACK}:{self.options.mlflow_port}"

    @property
    def s3_endpoint(self) -> str | None:
        """Address of the S3 store, if there is one."""
        return f"http://{_LOOPBACK}:{self.options.s3_port}" if self.options.store == "swift" else None

    @property
    def token_file(self) -> Path:
        """Ray's token, for nobody else to read."""
        return Path(self.folder, "token")

    @property
    def environment_file(self) -> Path:
        """What a shell reads to use the cluster: `source` it."""
        return Path(self.folder, "env.sh")

    def environment(self) -> dict[str, str]:
        """What a client of the cluster has in its environment."""
        found = {
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
        }
        if self.s3_endpoint is not None:
            found |= {
                "AWS_ENDPOINT_URL": self.s3_endpoint,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_SHARED_CREDENTIALS_FILE": str(Path(self.folder, "s3-credentials")),
            }
        return found


def default_folder() -> Path:
    """Where the state and logs of this user's cluster are."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "orchestrator", "cluster")


def find(folder: Path) -> LocalCluster | None:
    """The cluster that was brought up in `folder`, alive or not; None if there is none.

    Raises:
        ClusterError: its state cannot be read.
    """
    try:
        kept = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return LocalCluster(**{**kept, "options": LocalOptions(**kept["options"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ClusterError(f"{folder / _STATE} cannot be read ({error}); remove it if nothing of it runs") from None


def processes(cluster: LocalCluster) -> list[psutil.Process]:
    """Every live process that belongs to `cluster`."""
    if abs(psutil.boot_time() - cluster.boot) > 60:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _belongs(process, cluster) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _belongs(process: psutil.Process, cluster: LocalCluster) -> bool:
    if process.environ().get(MARK) == cluster.id:
        return True
    # Ray's agents and workers write their title over their environment, but their logs are below the scratch folder.
    return any(opened.path.startswith(f"{cluster.scratch}/") for opened in process.open_files())


def up(
    folder: Path,
    options: LocalOptions,
    *,
    node_environment: Mapping[str, str],
    say: Callable[[str], None] = lambda text: None,
) -> LocalCluster:
    """Bring a cluster up, and wait until it takes jobs.

    Args:
        node_environment: variables of the raylets beside their own.
        say: told what is being waited for.

    Raises:
        ClusterError: one is up already, a port is taken, memory is short, or something did not start; nothing is left running.
    """
    _refuse(folder, options)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "logs").mkdir(exist_ok=True)
    cluster = LocalCluster(
        id=secrets.token_hex(8),
        folder=str(folder.absolute()),
        scratch=tempfile.mkdtemp(prefix="orchestrator-"),
        created=time.time(),
        boot=psutil.boot_time(),
        options=options,
    )
    _write_private(folder / _STATE, json.dumps(asdict(cluster), indent=1))
    try:
        _start(cluster, node_environment, say)
    except BaseException:
        down(folder)
        raise
    return cluster


def _refuse(folder: Path, options: LocalOptions) -> None:
    earlier = find(folder)
    if earlier is not None and processes(earlier):
        raise ClusterError(f"a cluster is up already in {folder} ({earlier.dashboard}); `cluster down` stops it")
    if options.nodes < 1:
        raise ClusterError(f"--nodes {options.nodes}: at least one node must take work")
    for option, (host, port) in options.ports().items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ClusterError(f"{option} {port}: {host}:{port} cannot be used ({error.strerror})") from None
    needed = _SERVICES_GIB + _NODE_GIB * (options.nodes + 1)
    free = psutil.virtual_memory().available / 2**30
    if free < needed:
        raise ClusterError(
            f"--nodes {options.nodes}: that takes about {needed:.1f} GiB before any work, {free:.1f} GiB are free"
        )
    if earlier is not None:
        _remove_state(earlier)


def _start(cluster: LocalCluster, node_environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    folder, options = Path(cluster.folder), cluster.options
    _write_private(cluster.token_file, secrets.token_hex(32))
    programs = {"head": _ray_head(cluster), "mlflow": _mlflow(cluster)}
    programs |= {f"node{i + 1}": _ray_node(cluster, i + 1) for i in range(options.nodes)}
    environments: dict[str, dict[str, str]] = {}
    if options.store == "swift":
        say("the S3 store's environment (made once)")
        commands = _swift(cluster)
        programs |= {f"s3-{kind}": command for kind, command in commands.items()}
        environments = {f"s3-{kind}": swift.server_environment() for kind in commands}
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in cluster.environment().items())
    _write_private(cluster.environment_file, exports)
    conf = folder / "supervisord.conf"
    _write_private(conf, _supervisor_conf(cluster, programs, environments))
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf)]
    done = subprocess.run(command, env=_environment(cluster, node_environment), capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"the supervisor did not start: {(done.stderr or done.stdout).strip()[-500:]}")
    deadline = time.monotonic() + options.timeout_s
    say("the head, MLflow" + (" and the S3 store" if options.store == "swift" else ""))
    early = [name for name in programs if not name.startswith("node")]
    with _supervisor(cluster) as supervisor:
        for name in early:
            supervisor.startProcess(name, False)
        _wait(cluster, "head", deadline, lambda: _listens(_HEAD_HOST, options.gcs_port))
        say("the nodes")
        for i in range(options.nodes):
            supervisor.startProcess(f"node{i + 1}", False)
    _wait(cluster, "head", deadline, lambda: len(live_nodes(cluster)) > options.nodes)
    _wait(cluster, "head", deadline, lambda: _takes_jobs(cluster))
    say("MLflow")
    _wait(cluster, "mlflow", deadline, lambda: _answers(f"{cluster.tracking_uri}/health"))
    if cluster.s3_endpoint is not None:
        say("the S3 store")
        endpoint = cluster.s3_endpoint
        _wait(cluster, "s3-proxy", deadline, lambda: _answers(f"{endpoint}/healthcheck"))
        _make_bucket(cluster)


def _environment(cluster: LocalCluster, extra: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's, which its processes inherit: this process's, without what belongs to its user alone."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_NOT_INHERITED) and not any(part in key.upper() for part in _SECRET_NAMES)
    }
    return {
        **kept,
        MARK: cluster.id,
        "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}",  # jobs say `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # its handlers can hang the servers that Ray forks for clients (ray issue 63202)
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes for what nobody asks of it here
        **extra,
    }


def _ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]


def _ray_head(cluster: LocalCluster) -> list[str]:
    options = cluster.options
    return _ray(
        *("--head", f"--node-ip-address={_HEAD_HOST}", f"--port={options.gcs_port}", "--num-cpus=0"),
        *(f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={options.dashboard_port}"),
        f"--dashboard-agent-listen-port={options.dashboard_port + 1}",
        *(f"--ray-client-server-port={options.client_port}", f"--temp-dir={cluster.scratch}/head"),
    )


def _ray_node(cluster: LocalCluster, number: int) -> list[str]:
    options = cluster.options
    host = f"127.0.0.{2 + number}"
    return _ray(
        *(f"--address={_HEAD_HOST}:{options.gcs_port}", f"--node-ip-address={host}"),
        f"--dashboard-agent-listen-port={options.dashboard_port + 1}",
        *(f"--num-cpus={options.cpus_per_node or os.cpu_count()}", f"--temp-dir={cluster.scratch}/node{number}"),
    )


def _mlflow(cluster: LocalCluster) -> list[str]:
    place = f"s3://{BUCKET}/mlflow" if cluster.s3_endpoint else f"{cluster.folder}/artifacts"
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", _LOOPBACK, "--port", str(cluster.options.mlflow_port)),
        *("--backend-store-uri", f"sqlite:///{cluster.folder}/mlflow.db", "--artifacts-destination", place),
        *("--workers", "1"),
    ]


def _swift(cluster: LocalCluster) -> dict[str, list[str]]:
    """Commands of the S3 store's servers; its keys are made once for the folder, as its objects are."""
    folder = Path(cluster.folder, "s3")
    folder.mkdir(exist_ok=True, mode=0o700)
    try:
        python = swift.make_environment(swift.home(), *swift.REQUIREMENTS)
    except (subprocess.SubprocessError, OSError) as error:
        raise ClusterError(f"--store swift: its environment cannot be made: {error}") from None
    credentials = Path(cluster.folder, "s3-credentials")
    if not credentials.exists():
        keys = f"aws_access_key_id = orchestrator:user\naws_secret_access_key = {secrets.token_hex(20)}\n"
        _write_private(credentials, f"[default]\n{keys}")
    access, secret = _keys(cluster)
    ports = {kind: cluster.options.s3_port + i for i, kind in enumerate(("proxy", "account", "container", "object"))}
    try:
        return swift.configure(folder, python, ports=ports, access_key=access, secret_key=secret)
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"--store swift: {error.stderr.decode().strip()[-300:]}") from None


def _make_bucket(cluster: LocalCluster) -> None:
    import boto3
    from botocore.config import Config

    keys = _keys(cluster)
    client = boto3.session.Session(*keys, region_name="us-east-1").client(
        "s3", endpoint_url=cluster.s3_endpoint, config=Config(s3={"addressing_style": "path"})
    )
    client.create_bucket(Bucket=BUCKET)


def _keys(cluster: LocalCluster) -> tuple[str, str]:
    """Access key and secret key of the S3 store."""
    lines = Path(cluster.folder, "s3-credentials").read_text(encoding="utf-8").splitlines()
    access, secret = (line.partition("= ")[2].strip() for line in lines[1:])
    return access, secret


def _supervisor_conf(
    cluster: LocalCluster, programs: Mapping[str, list[str]], environments: Mapping[str, Mapping[str, str]]
) -> str:
    """supervisord's configuration; it expands %, so what is given is escaped."""
    logs = f"{cluster.folder}/logs"
    text = (
        f"[supervisord]\nlogfile={logs}/supervisord.log\npidfile={cluster.scratch}/supervisord.pid\nminfds=1024\n"
        f"[unix_http_server]\nfile={cluster.scratch}/supervisor.sock\nchmod=0600\n"
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
    ).replace("%", "%%")
    own = cluster.environment() if cluster.s3_endpoint else {}
    for name, command in programs.items():
        variables = dict(environments.get(name, {}))
        if name == "mlflow":
            variables |= {key: value for key, value in own.items() if key.startswith("AWS_")}
        given = ",".join(f'{key}="{value}"' for key, value in variables.items())
        text += (
            f"[program:{name}]\ncommand={shlex.join(command)}\nautostart=false\nautorestart=true\nstartretries=10\n"
            f"stopasgroup=true\nkillasgroup=true\nstopwaitsecs=3\nredirect_stderr=true\n"
            f"stdout_logfile={logs}/{name}.log\nstdout_logfile_maxbytes=10MB\nstdout_logfile_backups=1\n"
            + (f"environment={given}\n" if given else "")
        ).replace("%", "%%")
    return text


@contextlib.contextmanager
def _supervisor(cluster: LocalCluster) -> Iterator[Any]:
    """supervisord's remote calls, over its socket, which only this user may open."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, serverurl=f"unix://{cluster.scratch}/supervisor.sock")
    with xmlrpc.client.ServerProxy(f"http://{_LOOPBACK}", transport=transport) as proxy:
        yield proxy.supervisor


def states(cluster: LocalCluster) -> dict[str, tuple[str, str]]:
    """Program → its state and what the supervisor says of it; empty if the supervisor is gone."""
    try:
        with _supervisor(cluster) as supervisor:
            return {info["name"]: (info["statename"], info["description"]) for info in supervisor.getAllProcessInfo()}
    except (OSError, xmlrpc.client.Error):
        return {}


def live_nodes(cluster: LocalCluster) -> list[dict[str, Any]]:
    """Ray's nodes that are alive, as its dashboard tells them."""
    found = _ask(cluster, "/nodes?view=summary")["data"]["summary"]
    return [node for node in found if node["raylet"].get("state") == "ALIVE"]


def resources(cluster: LocalCluster) -> dict[str, float]:
    """Ray's resources, of all nodes together."""
    total: dict[str, float] = {}
    for node in live_nodes(cluster):
        for name, amount in node["raylet"].get("resourcesTotal", {}).items():
            if not name.startswith("node:"):
                total[name] = total.get(name, 0.0) + amount
    return total


def _takes_jobs(cluster: LocalCluster) -> bool:
    """Whether a submitted job would find the head's agent."""
    return _ask(cluster, "/api/jobs/") is not None


def _ask(cluster: LocalCluster, path: str) -> Any:
    token = cluster.token_file.read_text().strip()
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def _listens(host: str, port: int) -> bool:
    with socket.create_connection((host, port), timeout=1):
        return True


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)


def _wait(cluster: LocalCluster, program: str, deadline: float, ready: Callable[[], bool]) -> None:
    """Until `ready`; what fails meanwhile is not up yet."""
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if ready():
                return
        state, told = states(cluster).get(program, ("GONE", "the supervisor does not answer"))
        if state in ("FATAL", "GONE") or time.monotonic() > deadline:
            raise ClusterError(f"{program} did not come up ({state.lower()}: {told}){_last_words(cluster, program)}")
        time.sleep(0.1)


def _last_words(cluster: LocalCluster, program: str) -> str:
    log = Path(cluster.folder, "logs", f"{program}.log")
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"; {log} ends with: {' | '.join(lines[-3:])}" if lines else ""
    return ""


def down(folder: Path) -> int:
    """Stop what `up` started in `folder`, whatever became of it; returns how many processes that were.

    Data, logs, the token and the store's keys stay in the folder.

    Raises:
        ClusterError: nothing is up there, or something cannot be stopped.
    """
    cluster = find(folder)
    if cluster is None:
        raise ClusterError(f"no cluster is up in {folder}")
    alive = processes(cluster)
    if states(cluster):
        with contextlib.suppress(OSError, xmlrpc.client.Error), _supervisor(cluster) as supervisor:
            supervisor.shutdown()
        _until_gone(cluster, _STOP_S)
    for act in ("terminate", "kill"):
        left = processes(cluster)
        for process in left:
            with contextlib.suppress(psutil.Error):
                getattr(process, act)()
        if not left or _until_gone(cluster, 5.0):
            break
    if left := processes(cluster):
        raise ClusterError(f"processes {', '.join(str(process.pid) for process in left)} do not end")
    _remove_state(cluster)
    return len(alive)


def _until_gone(cluster: LocalCluster, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while processes(cluster):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _remove_state(cluster: LocalCluster) -> None:
    """Forget a cluster of which nothing runs any more; Ray's logs are kept beside the others."""
    for session in Path(cluster.scratch).glob("*/session_2*"):
        kept = Path(cluster.folder, "logs", "ray", session.parent.name)
        if (session / "logs").is_dir():
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(session / "logs", kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    Path(cluster.folder, _STATE).unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from the first byte."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
