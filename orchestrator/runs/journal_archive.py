"""Copies the journal of a run to the storage of the run in numbered segments, and reads it back."""

import threading
from pathlib import Path

import pyarrow.fs as arrow_fs

from orchestrator.runs.journal import logger
from workloads.storage.filesystems import atomic_write, read_bytes


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
        with atomic_write(self._filesystem, f"{self._folder}/{self._segments:06d}.jsonl") as stream:
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
