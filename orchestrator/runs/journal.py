"""The local journal between training and the tracking server: written first, delivered later, in order, by one thread.

The controller appends a line for every report; the driver, on the same machine, reads the file as it grows and hands
the records to a sink. So a slow or dead tracking server never stops training, and what it missed is still in the file.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""`{"kind": "metrics", "step": …, "time_ms": …, "metrics": {…}}`, or kind `artifacts` (`folder`) or `tags` (`tags`)."""


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
