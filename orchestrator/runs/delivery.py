"""`JournalDrain` delivers the records of a journal to a `Sink` (MLflow) from a background thread, and retries after an outage."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.runs.journal import JournalReader
from orchestrator.runs.records import Record

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes records."""

    def write(self, records: Sequence[Record]) -> None:
        """Deliver `records`. After an exception it is called again with the same ones; none may then count twice."""
        ...


class JournalDrain:
    """A thread that delivers a journal's records in order, until it is closed.

    Args:
        check: called before each delivery; if it raises, nothing is delivered until a later call returns.
        first_retry_s: wait after the first failed delivery; it doubles up to `last_retry_s`.
    """

    def __init__(
        self,
        path: str | Path,
        sink: Sink,
        *,
        check: Callable[[], None] = lambda: None,
        poll_s: float = 0.5,
        first_retry_s: float = 0.5,
        last_retry_s: float = 30.0,
    ) -> None:
        self._reader = JournalReader(path)
        self._sink, self._check = sink, check
        self._poll_s = poll_s
        self._first_retry_s = first_retry_s
        self._last_retry_s = last_retry_s
        self._pending: list[Record] = []
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="journal-drain", daemon=True)
        self.last_error: Exception | None = None

    def start(self) -> None:
        """Start delivering."""
        self._thread.start()

    def close(self, *, timeout_s: float = 60.0) -> int:
        """Deliver the rest, for at most `timeout_s`; returns how many records are still only in the journal."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        with contextlib.suppress(RuntimeError):  # never started
            self._thread.join(timeout_s + 5.0)
        return len(self._pending) + len(self._reader.read())

    def _run(self) -> None:
        delay = self._first_retry_s
        while True:
            closing = self._closing.is_set()
            self._pending += self._reader.read()
            if self._pending:
                try:
                    self._check()
                    self._sink.write(self._pending)
                    self._pending = []
                    self.last_error = None
                    delay = self._first_retry_s
                except Exception as error:
                    if self.last_error is None:
                        logger.warning("tracking: not delivered, will try again: %s", error)
                    self.last_error = error
            if closing and (not self._pending or time.monotonic() > self._deadline):
                return
            if self._pending:
                self._pause(min(delay, max(0.0, self._deadline - time.monotonic())))
                delay = min(2 * delay, self._last_retry_s)
            else:
                self._closing.wait(self._poll_s)

    def _pause(self, seconds: float) -> None:
        """Wait; `close` ends the first wait, since a run's end should not wait for a retry that is far off."""
        if self._closing.is_set():
            time.sleep(seconds)
        else:
            self._closing.wait(seconds)
