"""Runs a local cluster's services under supervisord: writes its configuration, starts it, and calls it over its socket."""

import contextlib
import re
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.errors import ClusterError, ClusterRequestError
from cluster.local.services import Program
from cluster.local.state import LOOPBACK, LocalCluster, write_private


class ProgramState(NamedTuple):
    """State of one service, as supervisord reports it."""

    name: str
    """RUNNING, STARTING, BACKOFF, FATAL, …"""
    description: str
    """Process id and uptime, or why it does not run."""


def start(cluster: LocalCluster, programs: Sequence[Program], environment: Mapping[str, str]) -> None:
    """Start supervisord with `programs`, of which none runs yet.

    Raises:
        ClusterError: it does not start.
    """
    path = Path(cluster.folder, "supervisord.conf")
    write_private(path, configuration(cluster, programs))
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"the supervisor did not start: {(done.stderr or done.stdout).strip()[-500:]}")


def configuration(cluster: LocalCluster, programs: Sequence[Program]) -> str:
    """Text of supervisord's configuration file.

    Raises:
        ClusterRequestError: a path has characters that the file cannot hold.
    """
    _checked(cluster.folder)
    _checked(cluster.scratch)
    sections: dict[str, dict[str, str]] = {
        "supervisord": {
            "logfile": f"{cluster.logs}/supervisord.log",
            "pidfile": f"{cluster.scratch}/supervisord.pid",
            "minfds": "1024",
        },
        "unix_http_server": {"file": f"{cluster.scratch}/supervisor.sock", "chmod": "0600"},
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for program in programs:
        sections[f"program:{program.name}"] = {
            "command": shlex.join(map(_checked, program.command)),
            "environment": ",".join(f'{name}="{_checked(value)}"' for name, value in program.environment.items()),
            "stdout_logfile": f"{cluster.logs}/{program.name}.log",
            **_PROGRAM_SETTINGS,
        }
    return "".join(
        f"[{section}]\n" + "".join(f"{key}={value}\n" for key, value in values.items())
        for section, values in sections.items()
    )


_PROGRAM_SETTINGS = {
    **{"autostart": "false", "autorestart": "true", "startretries": "10"},
    **{"stopasgroup": "true", "killasgroup": "true", "stopwaitsecs": "3"},
    **{"redirect_stderr": "true", "stdout_logfile_maxbytes": "10MB", "stdout_logfile_backups": "1"},
}


def _checked(value: str) -> str:
    """`value`, if supervisord reads it as it stands: its file has no way to escape quotes, comment signs and %.

    Raises:
        ClusterRequestError: it does not.
    """
    if re.search(r"[\"'\\%\x00-\x1f\x7f]|\s[;#]", value) or value != value.strip():
        raise ClusterRequestError(
            f"--folder: supervisord cannot read {value!r}; give a path without quotes, backslashes, comment signs and %"
        )
    return value


@contextlib.contextmanager
def remote(cluster: LocalCluster) -> Iterator[xmlrpc.client.ServerProxy]:
    """The XML-RPC interface of supervisord, over a socket that only its user can open; call it as `proxy.supervisor.METHOD`."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, serverurl=f"unix://{cluster.scratch}/supervisor.sock")
    with xmlrpc.client.ServerProxy(f"http://{LOOPBACK}", transport=transport) as proxy:
        yield proxy


def start_programs(cluster: LocalCluster, names: Sequence[str]) -> None:
    """Start the named programs without waiting for them."""
    with remote(cluster) as proxy:
        for name in names:
            proxy.supervisor.startProcess(name, False)


def shut_down(cluster: LocalCluster) -> None:
    """Ask supervisord to stop its programs and end; does nothing where it does not answer."""
    with contextlib.suppress(OSError, xmlrpc.client.Error), remote(cluster) as proxy:
        proxy.supervisor.shutdown()


def states(cluster: LocalCluster) -> dict[str, ProgramState]:
    """Program → its state; empty if the supervisor does not answer."""
    try:
        with remote(cluster) as proxy:
            rows = proxy.supervisor.getAllProcessInfo()
    except (OSError, xmlrpc.client.Error):
        return {}
    assert isinstance(rows, list)
    return {row["name"]: ProgramState(row["statename"], row["description"]) for row in rows}


def wait_for(cluster: LocalCluster, program: str, deadline: float, is_ready: Callable[[], bool]) -> None:
    """Wait until `is_ready` returns true; an OSError, ValueError or KeyError of it means not yet.

    Raises:
        ClusterError: the program has failed, or `deadline` (of `time.monotonic`) has passed; with the end of its log.
    """
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if is_ready():
                return
        state = states(cluster).get(program, ProgramState("GONE", "the supervisor does not answer"))
        if state.name in ("FATAL", "GONE") or time.monotonic() > deadline:
            why = f"{state.name.lower()}: {state.description}"
            raise ClusterError(f"{program} did not start ({why}){_end_of_log(cluster, program)}")
        time.sleep(0.1)


def _end_of_log(cluster: LocalCluster, program: str) -> str:
    log = cluster.logs / f"{program}.log"
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"; {log} ends with: {' | '.join(lines[-3:])}" if lines else ""
    return ""
