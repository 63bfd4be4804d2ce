"""Lists the processes of a local cluster: those that carry its mark in their environment, and their descendants."""

import contextlib
import time

import psutil

from cluster.local.state import MARK, LocalCluster


def processes(cluster: LocalCluster) -> list[psutil.Process]:
    """Every live process of `cluster`.

    A process belongs to it if `MARK` in its environment holds the cluster's id, or if a parent of it does. Nothing else counts:
    a shell, an editor or `tail -f` that reads one of the cluster's files is not part of it.
    """
    if abs(psutil.boot_time() - cluster.boot) > 60:
        return []
    alive: dict[int, psutil.Process] = {}
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            parents[process.pid] = process.ppid()
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            alive[process.pid] = process
            with contextlib.suppress(psutil.AccessDenied, OSError):  # another user's environment
                if process.environ().get(MARK) == cluster.id:
                    marked.add(process.pid)
    return [process for pid, process in alive.items() if _descends(pid, parents, marked)]


def _descends(pid: int, parents: dict[int, int], marked: set[int]) -> bool:
    seen: set[int] = set()
    while pid not in marked:
        seen.add(pid)
        if pid not in parents or parents[pid] in seen:
            return False
        pid = parents[pid]
    return True


def wait_until_gone(cluster: LocalCluster, timeout_s: float) -> bool:
    """Wait for the end of every process of `cluster`; returns whether all have ended within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while processes(cluster):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def end(cluster: LocalCluster) -> list[psutil.Process]:
    """Terminate, then kill, every process of `cluster`; returns those that are still there."""
    for method in (psutil.Process.terminate, psutil.Process.kill):
        left = processes(cluster)
        for process in left:
            with contextlib.suppress(psutil.Error):
                method(process)
        if not left or wait_until_gone(cluster, 5.0):
            break
    return processes(cluster)
