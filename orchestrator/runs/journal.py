"""The local journal between training and the tracking server: written first, delivered later, in order, by one thread.

The controller appends a line for every report; the driver, on the same machine, reads the file as it grows and hands
the records to a sink. So a slow or dead tracking server never stops training, and what it missed is still in the file.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as arrow_fs

from workloads.storage.filesystems import read_bytes

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""`{"kind": "metrics", "step": …, "time_ms": …, "metrics": {…}}`, or kind `artifacts` (`folder`) or `tags` (`tags`)."""


class Sink(Protocol):
    """Where records go. `write` may raise and is then called again with the same records."""

    def write(self, records: Sequence[Record]) -> None:
        """Deliver `records`; one that was delivered before must not count twice."""
        ...


class Journal:
    """Appends records to a file, one line each; several processes may append to the same file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn():
            self._write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is in the file, whatever becomes of this process, when this returns."""
        self._write(json.dumps(record).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def _torn(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


class JournalArchive:
    """Keeps a copy of the journal in the run's storage, in closed segments: the machine that wrote it may not come back.

    Laid end to end, the segments are a beginning of the journal.
    """

    def __init__(
        self, path: str | Path, filesystem: arrow_fs.FileSystem, folder: str, *, period_s: float = 10.0
    ) -> None:
        self._path, self._filesystem, self._folder = Path(path), filesystem, folder
        self._period_s = period_s
        self._segments = self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal-archive", daemon=True)

    def __enter__(self) -> "JournalArchive":
        """Fetch what other machines wrote, then copy what is written here from now on.

        Raises:
            OSError: the storage does not answer.
        """
        self._restore()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30.0)

    def _restore(self) -> None:
        segments = read_segments(self._filesystem, self._folder)
        kept = b"".join(segments)
        self._segments, self._offset = len(segments), len(kept)
        here = self._path.read_bytes() if self._path.is_file() else b""
        if not here.startswith(kept):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(kept)

    def push(self) -> None:
        """Copy the complete lines that are not in the storage yet, as one more segment."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            return
        self._filesystem.create_dir(self._folder, recursive=True)
        with self._filesystem.open_output_stream(f"{self._folder}/{self._segments:06d}.jsonl") as stream:
            stream.write(whole)
        self._segments += 1
        self._offset += len(whole)

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(self._period_s)
            try:
                self.push()
            except OSError as error:
                logger.warning("journal: not copied to the run's storage, will try again: %s", error)
            if stopping:
                return


def read_segments(filesystem: arrow_fs.FileSystem, folder: str) -> list[bytes]:
    """What a `JournalArchive` keeps in `folder`, in order."""
    selector = arrow_fs.FileSelector(folder, allow_not_found=True)
    names = sorted(info.path for info in filesystem.get_file_info(selector) if info.path.endswith(".jsonl"))
    return [read_bytes(filesystem, name) for name in names]


def parse_journal(text: bytes, *, source: str) -> list[Record]:
    """The records of whole lines; a line that a killed process left half-written is skipped."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            if line.strip():
                logger.warning("journal %s: skipped a torn line of %d bytes", source, len(line))
    return records


class JournalReader:
    """Reads complete lines from where it stopped last time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def read(self) -> list[Record]:
        """The records appended since the last call; a line that a killed process left half-written is skipped."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return parse_journal(whole, source=self.path.name)


class JournalDrain:
    """One thread that delivers a journal's records to a sink, however often that takes, until it is closed."""

    def __init__(
        self,
        path: str | Path,
        sink: Sink,
        *,
        poll_s: float = 0.5,
        first_retry_s: float = 0.5,
        last_retry_s: float = 30.0,
    ) -> None:
        self._reader = JournalReader(path)
        self._sink = sink
        self._poll_s = poll_s
        self._first_retry_s = first_retry_s
        self._last_retry_s = last_retry_s
        self._pending: list[Record] = []
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="journal-drain", daemon=True)
        self.last_error: Exception | None = None

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def close(self, *, timeout_s: float = 60.0) -> int:
        """Deliver what is left, for at most `timeout_s`; returns how many records stayed behind in the journal."""
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
                time.sleep(min(delay, max(0.0, self._deadline - time.monotonic())))
                delay = min(2 * delay, self._last_retry_s)
            else:
                self._closing.wait(self._poll_s)
