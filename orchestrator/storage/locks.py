"""`hold`: an exclusive lock on a folder of the storage, by `flock` on a file or by a lease in an object store."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from orchestrator.storage import file_lock, lease, object_store
from orchestrator.storage.lock import Lock
from workloads.storage.filesystems import resolve_uri


@contextmanager
def hold(uri: str, *, what: str) -> Iterator[Lock]:
    """Hold the folder `uri`, which is created, until the context ends or this process dies.

    File systems other than local folders and S3 are not locked.

    Args:
        what: what the holder does, for the message to others ("training run 'x'").

    Raises:
        HeldError: another process holds it.
        DataError: nothing can be written there.
    """
    if uri.startswith("s3://"):
        object_store.preflight(uri)
        with lease.hold_lease(_lease_of(uri), what=what) as lock:
            yield lock
        return
    filesystem, root = resolve_uri(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield Lock()
        return
    with file_lock.hold_file(root, what=what) as lock:
        yield lock


def refuse_if_held(uri: str, *, what: str) -> None:
    """Fail early where `hold` would: quick, and nothing is written.

    Raises:
        HeldError: another process holds the folder `uri`.
        DataError: the store cannot be read.
    """
    if uri.startswith("s3://"):
        lease.refuse_if_held(_lease_of(uri))
        return
    filesystem, root = resolve_uri(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        file_lock.refuse_if_held(root, what=what)


def _lease_of(uri: str) -> str:
    return f"{uri.rstrip('/')}/_lock"
