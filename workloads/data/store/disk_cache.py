"""`DiskCache`: row groups on a local disk for later epochs, in a bounded folder that the processes of a node share.

Every entry is a file of its own that ends with a checksum and is renamed into place: a reader sees all of it or none, and an
entry that a crash has damaged is deleted when it is read. The least recently used are removed first. A process sweeps after
it has written 1/16 of the limit, so W processes exceed the limit by at most W/16 of it.
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
    """Bytes by name in a folder of at most `max_bytes`; an error of the disk is a miss, never raised."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._max_bytes = max_bytes
        self._unswept = max_bytes  # sweep at the first write: another run may have left more
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The bytes stored under `name`, or None."""
        path = self._path(name)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        data = _checked(stored)
        with contextlib.suppress(OSError):
            if data is None:
                path.unlink()
            else:
                os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, if the disk lets it."""
        path = self._path(name)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:  # not synced: after a power cut the checksum tells
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
        if due and not self.sweep():
            with contextlib.suppress(OSError):  # a folder that cannot be swept must not grow
                path.unlink()

    def sweep(self) -> bool:
        """Remove the least recently used entries above the limit, and partial files of processes that crashed.

        Returns:
            False where the folder cannot be locked or listed; True too where another process is sweeping it.
        """
        try:
            with self._sweeper_lock():
                self._remove_excess()
        except BlockingIOError:
            pass
        except OSError:
            return False
        with self._lock:
            self._unswept = 0
        return True

    def _remove_excess(self) -> None:
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
    def _sweeper_lock(self) -> Iterator[None]:
        """Lock the folder against other sweepers, until the block ends or this process dies.

        Raises:
            BlockingIOError: another process has the lock.
            OSError: the lock file cannot be opened or locked.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def _checked(stored: bytes) -> bytes | None:
    """The bytes without their trailer; None where it does not match them."""
    if len(stored) < _TRAILER.size:
        return None
    data = stored[: -_TRAILER.size]
    return data if _TRAILER.unpack(stored[-_TRAILER.size :]) == (len(data), zlib.crc32(data)) else None
