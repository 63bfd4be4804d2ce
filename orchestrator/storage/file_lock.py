"""`FileLock`: an exclusive `flock` on a file named `.lock`, which the kernel releases when its holder dies.

The file is opened for writing, which NFS requires of an exclusive lock, and stays where it is: to remove it would let one
process lock the old file and another one the new. filelock is not used: its versions before 4 take every error of `flock`
for a lock that is held.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.storage.lock import HeldError, Holder, Lock
from workloads.errors import DataError

NAME = ".lock"


@contextmanager
def hold_file(folder: str, *, what: str) -> Iterator[Lock]:
    """Hold `folder`/.lock; the folder is created.

    Args:
        what: what the holder does, for the message to others ("training run 'x'").

    Raises:
        HeldError: another process holds it.
        DataError: the file cannot be created or locked.
    """
    path = os.path.join(folder, NAME)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"{path}: cannot be created ({error.strerror}); choose a folder that can be written") from None
    try:
        _lock(descriptor, path, what)
        with suppress(OSError):  # a full disk; the name of the holder is only for the message
            os.ftruncate(descriptor, 0)
            os.write(descriptor, Holder.here().as_json().encode())
        yield Lock()
    finally:
        os.close(descriptor)


def refuse_if_held(folder: str, *, what: str) -> None:
    """Return if nobody holds `folder`/.lock; nothing is created.

    Raises:
        HeldError: another process holds it.
        DataError: it cannot be locked.
    """
    path = os.path.join(folder, NAME)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return  # never held, or to be explained by `hold_file`
    try:
        _lock(descriptor, path, what)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = os.path.dirname(path)
        if error.errno == errno.EWOULDBLOCK:
            raise HeldError(f"{folder}: another process is {what}{_holder(path)}; wait for it to end") from None
        raise DataError(
            f"{path}: cannot be locked ({error.strerror}); choose a folder on a file system with flock, "
            "or mount this one with locks"
        ) from None


def _holder(path: str) -> str:
    with suppress(OSError, ValueError):
        holder = Holder.parse(json.loads(Path(path).read_text(encoding="utf-8")))
        return f" ({holder})" if holder else ""
    return ""
