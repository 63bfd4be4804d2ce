"""Row groups kept on a local disk for later epochs: bounded, shared by the processes of a node, sound after a crash.

Every entry is a file of its own with a checksum at its end, written aside and renamed: a reader finds it whole or not at
all, and one that a crash has left half written is found out and dropped. The longest unused go first. A process sweeps
after it has written 1/16 of the limit, so W processes exceed the limit by no more than W/16 of it.
"""

import contextlib
import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_TRAILER = struct.Struct("<QI")  # length, CRC-32
_STALE_S = 600.0


class DiskCache:
    """Bytes by name in a folder of at most `max_bytes`; what goes wrong with the disk is a miss, never an error."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._max_bytes = max_bytes
        self._unswept = max_bytes  # sweep at the first write: another run may have left more
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(self, name: str) -> bytes | None:
        """The bytes kept under `name`, or None."""
        path = self._path(name)
        try:
            stored = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        data = _unsealed(stored)
        with contextlib.suppress(OSError):
            if data is None:
                path.unlink()
            else:
                os.utime(path)
        if data is None:
            self.misses += 1
        else:
            self.hits += 1
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`."""
        path = self._path(name)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.write(_TRAILER.pack(len(data), zlib.crc32(data)))
            partial.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            return
        with self._lock:
            self._unswept += len(data) + _TRAILER.size
            due = self._unswept >= self._max_bytes // 16
            if due:
                self._unswept = 0
        if due:
            self.sweep()

    def drop(self, name: str) -> None:
        """Forget what is kept under `name`."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def sweep(self) -> None:
        """Remove the longest unused entries above the limit, and what crashed writers have left."""
        with self._only_sweeper() as alone:
            if not alone:
                return
            entries = []
            for path in self._folder.glob("*/*"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    if path.suffix != ".partial":
                        entries.append((status.st_mtime, status.st_size, path))
                    elif time.time() - status.st_mtime > _STALE_S:
                        path.unlink()
            total = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries, key=lambda entry: entry[0]):
                if total <= self._max_bytes:
                    return
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def _path(self, name: str) -> Path:
        # Spread over folders: one with a million files is slow to list.
        return self._folder / f"{zlib.crc32(name.encode()) & 0xFF:02x}" / name

    @contextlib.contextmanager
    def _only_sweeper(self) -> Iterator[bool]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    yield False
                    return
                yield True  # closing the file lets go
        except OSError:
            return


def _unsealed(stored: bytes) -> bytes | None:
    """The bytes without their trailer, None if it does not fit them."""
    if len(stored) < _TRAILER.size:
        return None
    data = stored[: -_TRAILER.size]
    return data if _TRAILER.unpack(stored[-_TRAILER.size :]) == (len(data), zlib.crc32(data)) else None
