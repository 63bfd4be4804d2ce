"""The run's journal: `Journal` appends records to a local file, `JournalReader` and `parse_journal` read them.

Ray Train's controller appends one line for each report. The driver, on the same machine, reads the file as it grows and
delivers the records to the tracking server (`runs.delivery`). A slow or dead server therefore never blocks training, and
everything it missed is still in the file.
"""

import contextlib
import errno
import json
import logging
import os
from pathlib import Path

from orchestrator.runs.records import Record, from_json, to_json

logger = logging.getLogger(__name__)


class Journal:
    """Appends records to a file, one line each. Several processes may append to the same file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._has_incomplete_line():
            self._write(b"\n")

    def append(self, record: Record) -> None:
        """Add one record. When this returns the line is in the file, even if this process dies next."""
        self._write(json.dumps(to_json(record)).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, line) < len(line):  # the disk is full; the next record must not continue this line
                with contextlib.suppress(OSError):
                    os.write(descriptor, b"\n")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)

    def _has_incomplete_line(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def parse_journal(text: bytes, *, source: str) -> list[Record]:
    """The records in `text`. Lines that cannot be parsed, such as one cut short by a kill, are skipped with a warning."""
    records = []
    for line in text.splitlines():
        try:
            records.append(from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if line.strip():
                logger.warning("journal %s: skipped a line of %d bytes (%s)", source, len(line), error)
    return records


class JournalReader:
    """Reads the complete lines of a journal, each once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def read(self) -> list[Record]:
        """The records appended since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            complete = complete_lines(file.read())
        self._offset += len(complete)
        return parse_journal(complete, source=self.path.name)


def complete_lines(text: bytes) -> bytes:
    """`text` up to and including its last line break."""
    return text[: text.rfind(b"\n") + 1]
