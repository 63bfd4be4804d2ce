"""`Lock`: what a process may ask of a lock that it holds; `HeldError` and `LockLostError`; `Holder` names a process."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from workloads.errors import DataError, RunFailedError


class HeldError(DataError):
    """Another process holds the lock."""


class LockLostError(RunFailedError):
    """Another process took the lock over while this one could not renew it."""


class Lock:
    """A lock that this process holds. A local one cannot be lost; `S3Lease` can."""

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken the lock."""
        return False

    def check(self) -> None:
        """Return if this process still holds the lock; call it before anything that only the holder may do.

        Raises:
            LockLostError: another process has taken it.
            StoreUnavailableError: the store cannot be asked, and the lease has run out.
        """

    def on_lost(self, action: Callable[[], None]) -> None:
        """Call `action`, from another thread, as soon as the lock is known to be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds a lock."""

    host: str
    pid: int
    namespace: str  # equal for two processes only where they see each other's pids

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(host=socket.gethostname(), pid=os.getpid(), namespace=_namespace())

    @classmethod
    def parse(cls, fields: Any) -> "Holder | None":
        """The holder that `as_json` wrote; None for anything else."""
        try:
            return cls(host=str(fields["host"]), pid=int(fields["pid"]), namespace=str(fields["namespace"]))
        except (KeyError, TypeError, ValueError):
            return None

    def as_json(self) -> str:
        """For a lock file."""
        return json.dumps(asdict(self))

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False for one on another machine or in another container."""
        if not self.namespace or self.namespace != _namespace():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _namespace() -> str:
    """The kernel's boot and the pid namespace; empty where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
