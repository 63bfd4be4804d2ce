"""Writes checkpoints from a background thread, with retries until the patience of the run ends."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from workloads.storage.checkpoint import CheckpointError, CheckpointMeta, Snapshot, first_line, log
from workloads.storage.filesystems import is_final


class CheckpointWriteError(CheckpointError):
    """The store did not take a checkpoint for as long as the run had patience."""


class Writes(Protocol):
    """The part of a store that the writer needs."""

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write it; may raise OSError and be asked again."""
        ...


class CheckpointWriter:
    """Writes snapshots in order on a thread of its own; what fails is tried again while training goes on.

    A newer snapshot takes the place of one that waits or could not be written so far, so that an object store's outage
    costs memory for two, not for as many as fall due meanwhile.

    Args:
        patience_s: how long writing may fail before the run is stopped.
    """

    def __init__(self, store: Writes, *, patience_s: float = 300.0, first_wait_s: float = 0.5) -> None:
        self._store, self._patience_s, self._first_wait_s = store, patience_s, first_wait_s
        self._waiting: Snapshot | None = None
        self._busy = self._closing = False
        self._failure: CheckpointError | None = None
        self._changed = threading.Condition()
        self.newest: CheckpointMeta | None = None
        """The newest checkpoint that is written whole by this writer."""
        self.seconds = 0.0
        """Time spent writing, cumulative."""
        self.retries = 0
        """Writes that failed and were tried again, cumulative."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Have `snapshot` written; returns at once.

        Raises:
            CheckpointError: an earlier one could not be written.
        """
        with self._changed:
            self._raise()
            self._waiting = snapshot
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if a checkpoint could not be written."""
        with self._changed:
            self._raise()

    def flush(self) -> None:
        """Wait until everything that was submitted is written.

        Raises:
            CheckpointError: it could not be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._busy or self._waiting))
            self._raise()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Write what waits, for at most `timeout_s`, then stop; errors were or will be told by `flush`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    return
                self._busy = True
            failure = self._write(snapshot)
            del snapshot  # its copy of all weights would otherwise live until the next checkpoint
            with self._changed:
                self._busy = False
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _write(self, snapshot: Snapshot) -> CheckpointError | None:
        deadline = time.monotonic() + self._patience_s
        for wait_s in _waits(self._first_wait_s):
            with self._changed:
                if self._waiting is not None:  # newer than what could not be written so far
                    snapshot, self._waiting = self._waiting, None
            started = time.perf_counter()
            try:
                self.newest = self._store.write(snapshot)
            except Exception as error:
                self.retries += 1
                if is_final(error) or time.monotonic() + wait_s > deadline:
                    whole = (
                        f"the newest whole one is of step {self.newest.step}" if self.newest else "none was written yet"
                    )
                    return CheckpointWriteError(
                        f"the checkpoint of step {snapshot.meta.step} cannot be written: {first_line(error)}; {whole}; "
                        "see that storage.path can be written and has room, then give the same command again"
                    )
                log.warning(
                    "checkpoint of step %d: not written (%s), trying again", snapshot.meta.step, first_line(error)
                )
            else:
                return None
            finally:
                self.seconds += time.perf_counter() - started
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def _waits(first_s: float, longest_s: float = 15.0) -> Iterator[float]:
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.5, 1.0)
        wait_s = min(2 * wait_s, longest_s)
