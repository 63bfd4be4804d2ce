"""Names of the files and folders of a dataset that is being built, and atomic writes to them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

import pyarrow.fs as pafs

Reject = tuple[str, str, str]
"""(path in the source, image id, reason)"""

STATE_FOLDER = "_build"
PARTIAL = ".partial-"


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.parquet"


def part_folder(root: str, part: str) -> str:
    return f"{root}/{part}" if part else root


@contextmanager
def atomic_file(filesystem: pafs.FileSystem, path: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: written aside and renamed, or uploaded in one piece."""
    # An object store's upload becomes visible only when it is closed; a rename there would copy.
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as sink:
            yield cast(BinaryIO, sink)
        return
    partial = f"{path}{PARTIAL}{os.getpid()}"
    try:
        with filesystem.open_output_stream(partial) as sink:
            yield cast(BinaryIO, sink)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(partial)
        raise
    filesystem.move(partial, path)
