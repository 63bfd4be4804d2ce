"""One process at a time: a lock on a place of the storage, local or in an object store, that a dead process lets go."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from orchestrator.storage import object_store
from orchestrator.storage.object_store import HeldError
from workloads.errors import DataError
from workloads.storage.filesystems import resolve_uri

_NAME = "_lock"


@contextmanager
def hold(uri: str, *, what: str) -> Iterator[None]:
    """Be alone at the folder `uri`, which is made, while the context lasts.

    Raises:
        HeldError: another process is there (`what` tells what it does).
        DataError: nothing can be written there.
    """
    if uri.startswith("s3://"):
        object_store.preflight(uri)
        with object_store.lock(f"{uri.rstrip('/')}/{_NAME}", what=what):
            yield
        return
    filesystem, root = resolve_uri(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    try:
        os.makedirs(root, exist_ok=True)
        folder = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{uri}: cannot be written ({error}); give another place") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        raise HeldError(f"{uri}: another process is {what}; wait for it") from None
    try:
        yield
    finally:
        os.close(folder)
