"""`JournalArchive` copies a run's journal to the run's storage in numbered segments; `read_segments` reads them back."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as arrow_fs

from orchestrator.runs.journal import complete_lines, parse_journal
from orchestrator.runs.records import TagsRecord
from workloads.errors import UserError
from workloads.storage.filesystems import atomic_write, read_bytes

logger = logging.getLogger(__name__)


class JournalArchive:
    """Copies new lines of the journal to the storage every `period_s` seconds, because this machine may be lost.

    The segments, concatenated in order, are a prefix of the journal. Before each one `check` is called; if it raises a
    `UserError`, nothing is copied: the process no longer owns the run, or does not know.
    """

    def __init__(
        self,
        path: str | Path,
        filesystem: arrow_fs.FileSystem,
        folder: str,
        *,
        check: Callable[[], None] = lambda: None,
        period_s: float = 10.0,
    ) -> None:
        self._path, self._filesystem, self._folder = Path(path), filesystem, folder
        self._check, self._period_s = check, period_s
        self._segments = self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal-archive", daemon=True)

    def start(self) -> None:
        """Restore the lines that other machines archived, then copy new lines from now on.

        Raises:
            OSError: the storage does not answer.
        """
        self._restore()
        self._thread.start()

    def close(self) -> bool:
        """Copy the remaining lines and stop; returns whether every line is in the storage now."""
        self._stop.set()
        self._thread.join(30.0)
        return not self._thread.is_alive() and (not self._path.exists() or self._offset == self._path.stat().st_size)

    def _restore(self) -> None:
        """Make the archived lines a prefix of the local file, and keep local lines that were never archived."""
        segments = read_segments(self._filesystem, self._folder)
        archived = b"".join(segments)
        self._segments, self._offset = len(segments), len(archived)
        here = self._path.read_bytes() if self._path.is_file() else b""
        if not here.startswith(archived):
            with atomic_write(arrow_fs.LocalFileSystem(), str(self._path)) as file:
                file.write(archived + _unarchived(here, archived))

    def push(self) -> None:
        """Copy the complete lines that are not in the storage yet, as one more segment."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            fresh = complete_lines(file.read())
        if not fresh:
            return
        with atomic_write(self._filesystem, f"{self._folder}/{self._segments:06d}.jsonl") as stream:
            stream.write(fresh)
        self._segments += 1
        self._offset += len(fresh)

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(self._period_s)
            try:
                self._check()
                self.push()
            except (OSError, UserError) as error:
                logger.warning("journal: not copied to the run's storage, will try again: %s", error)
            if stopping:
                return


def _unarchived(here: bytes, archived: bytes) -> bytes:
    """The lines of `here` that `archived` lacks, in order.

    This machine wrote them before another one continued the run. Its tags are left out: the later attempt has set them.
    """
    known = set(archived.splitlines())
    lines = [line for line in complete_lines(here).splitlines() if line not in known]
    kept = [line for line in lines if not _holds_tags(line)]
    return b"".join(line + b"\n" for line in kept)


def _holds_tags(line: bytes) -> bool:
    return any(isinstance(record, TagsRecord) for record in parse_journal(line, source="journal.jsonl"))


def read_segments(filesystem: arrow_fs.FileSystem, folder: str) -> list[bytes]:
    """The segments that a `JournalArchive` wrote to `folder`, in order."""
    selector = arrow_fs.FileSelector(folder, allow_not_found=True)
    names = sorted(info.path for info in filesystem.get_file_info(selector) if info.path.endswith(".jsonl"))
    return [read_bytes(filesystem, name) for name in names]
