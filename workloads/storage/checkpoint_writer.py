"""`CheckpointWriter`: writes checkpoints from a background thread, and tries again while training goes on."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from workloads.storage.checkpoint import CheckpointError, CheckpointMeta, Snapshot, first_line, log
from workloads.storage.filesystems import is_final
from workloads.storage.space import is_full, mebibytes, num_bytes


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written, and trying again would not help or did not."""


class Writes(Protocol):
    """The part of a `CheckpointStore` that the writer needs."""

    folder: str

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write `snapshot`; a call that raised OSError can be repeated."""
        ...

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes free; None where that is not known."""
        ...


class CheckpointWriter:
    """Writes snapshots in order on a thread of its own, with retries while training goes on.

    A newer snapshot replaces one that waits or could not be written so far, so that an outage costs memory for two, not for
    all that fall due meanwhile. A full disk does not stop the run before its end: room may be freed at any time.

    Args:
        patience_s: how long writing may fail, other than by a full disk, before the run is stopped.
        warn: shows a line to the user, called for each failed write; None: the log alone.
    """

    def __init__(
        self,
        store: Writes,
        *,
        patience_s: float = 300.0,
        first_wait_s: float = 0.5,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._patience_s, self._first_wait_s, self._warn = store, patience_s, first_wait_s, warn
        self._waiting: Snapshot | None = None
        self._busy = self._closing = False
        self._flushing = 0
        self._failure: CheckpointError | None = None
        self._changed = threading.Condition()
        self.newest: CheckpointMeta | None = None
        """The newest checkpoint that this writer has written completely."""
        self.retries = 0
        """Writes that failed, cumulative."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Queue `snapshot` for writing and return at once.

        Raises:
            CheckpointError: an earlier one could not be written.
        """
        with self._changed:
            self._raise()
            self._waiting = snapshot
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything that was submitted is written.

        Raises:
            CheckpointError: it could not be.
        """
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or not (self._busy or self._waiting))
            self._flushing -= 1
            self._raise()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Write the queued snapshot, for at most `timeout_s`, then stop; only `flush` and `submit` raise its error."""
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
            queued = [snapshot]
            del snapshot  # a newer one that takes its place must free its copy of all weights
            failure = self._write(queued)
            with self._changed:
                self._busy = False
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _write(self, queued: list[Snapshot]) -> CheckpointError | None:
        snapshot = queued.pop()  # the only reference
        deadline = time.monotonic() + self._patience_s
        for wait_s in _waits(self._first_wait_s):
            with self._changed:
                if self._waiting is not None:  # newer than the one that could not be written so far
                    snapshot, self._waiting = self._waiting, None
                ending = bool(self._flushing) or self._closing
            try:
                self.newest = self._store.write(snapshot)
                return None
            except Exception as error:
                self.retries += 1
                full = is_full(error)
                out_of_patience = ending if full else time.monotonic() + wait_s > deadline
                why = self._full_disk(snapshot) if full else first_line(error)
                if is_final(error) or out_of_patience:
                    return self._error(snapshot, why, full)
                self._report(snapshot, why, full)
            self._pause(wait_s, until_the_end=full)
        raise AssertionError("unreachable")

    def _report(self, snapshot: Snapshot, why: str, full: bool) -> None:
        newest = self._newest_step(full)
        lost = "all steps so far" if newest is None else f"all steps after {newest}"
        until = "until its end; free space there" if full else f"for up to {self._patience_s:g} s"
        line = (
            f"checkpoint of step {snapshot.meta.step}: not written yet ({why}); training goes on and the write is tried "
            f"again {until}; a crash before that loses {lost}"
        )
        log.warning("%s", line)
        if self._warn is not None:
            self._warn(line)

    def _pause(self, wait_s: float, *, until_the_end: bool) -> None:
        """Wait; with `until_the_end` no longer than until the run ends, because a full disk is tried once more then."""
        with self._changed:
            self._changed.wait_for(lambda: until_the_end and (self._flushing or self._closing), timeout=wait_s)

    def _error(self, snapshot: Snapshot, why: str, full: bool) -> CheckpointWriteError:
        newest = self._newest_step(full)
        left = f"the newest complete checkpoint is that of step {newest}" if newest else "the run has no complete one"
        remedy = "free space there" if full else f"see that {self._store.folder} can be written"
        return CheckpointWriteError(
            f"the checkpoint of step {snapshot.meta.step} cannot be written: {why}; {left}; "
            f"{remedy}, then give the same command again"
        )

    def _newest_step(self, answers: bool) -> int | None:
        """Step of the newest complete checkpoint; a store that does not answer is asked only if this writer wrote none."""
        if self.newest is not None and not answers:
            return self.newest.step
        try:
            return max(self._store.steps(), default=None)  # those of earlier attempts at the run too
        except OSError:
            return None

    def _full_disk(self, snapshot: Snapshot) -> str:
        free = self._store.free_bytes()
        room = (
            ""
            if free is None
            else f" ({mebibytes(free)} free, the checkpoint needs {mebibytes(num_bytes(snapshot.state))})"
        )
        return f"No space left on device, {self._store.folder}{room}"


def _waits(first_s: float, longest_s: float = 15.0) -> Iterator[float]:
    """Growing, jittered waits, seconds, without end."""
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.5, 1.0)
        wait_s = min(2 * wait_s, longest_s)
