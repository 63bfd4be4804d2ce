"""`atomic_write`: the file is complete, or it is what it was before, and nothing is left beside it."""

import multiprocessing
import os
import signal

import pyarrow.fs as pafs
import pytest

from workloads.storage import filesystems
from workloads.storage.filesystems import PARTIAL, atomic_write

LOCAL = pafs.LocalFileSystem()


class NotLocal(pafs.FileSystemHandler):
    """The local disk, as `atomic_write` sees an object store: what is not closed is not there, nothing is renamed."""

    def __init__(self) -> None:
        self.opened, self.failing = 0, 0

    def __getattr__(self, name):
        return getattr(LOCAL, name)

    def open_output_stream(self, path, metadata):
        self.opened += 1
        if self.opened <= self.failing:
            raise OSError("HTTP status 503: SLOW_DOWN")
        return LOCAL.open_output_stream(path)

    def delete_file(self, path):
        LOCAL.delete_file(path)


for _name in pafs.FileSystemHandler.__abstractmethods__ - {"open_output_stream", "delete_file"}:
    setattr(NotLocal, _name, lambda self, *_: pytest.fail("not used"))
NotLocal.__abstractmethods__ = frozenset()


def write(filesystem, path, *parts: bytes, error: BaseException | None = None) -> None:
    with atomic_write(filesystem, str(path)) as file:
        for part in parts:
            file.write(part)
        if error is not None:
            raise error


@pytest.fixture(params=["local", "object store"])
def filesystem(request):
    return LOCAL if request.param == "local" else pafs.PyFileSystem(NotLocal())


def test_a_file_is_replaced_when_the_block_ends(filesystem, tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"another"):
        with atomic_write(filesystem, str(path)) as file:
            file.write(content[:2])
            file.write(content[2:])
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_what_was_there(filesystem, tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(type(error)):
        write(filesystem, path, b"half", error=error)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_write_leaves_nothing(filesystem, tmp_path):
    with pytest.raises(ValueError):
        write(filesystem, tmp_path / "file", b"half", error=ValueError())
    assert not list(tmp_path.iterdir())


def test_local_folders_are_created(tmp_path):
    write(LOCAL, tmp_path / "some" / "folder" / "file", b"x")
    assert (tmp_path / "some" / "folder" / "file").read_bytes() == b"x"


def test_a_large_object_is_streamed_and_removed_when_the_block_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystems, "_BUFFERED_BYTES", 4)
    store = NotLocal()
    write(pafs.PyFileSystem(store), tmp_path / "file", b"123", b"45", b"6")
    assert (tmp_path / "file").read_bytes() == b"123456" and store.opened == 1
    with pytest.raises(ValueError):
        write(pafs.PyFileSystem(store), tmp_path / "other", b"12345", error=ValueError())
    assert not (tmp_path / "other").exists()


def test_a_small_object_is_uploaded_again_after_an_outage(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystems, "_FIRST_WAIT_S", 0.001)
    store = NotLocal()
    store.failing = 2
    write(pafs.PyFileSystem(store), tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x" and store.opened == 3


def _killed_while_writing(path: str) -> None:
    with atomic_write(LOCAL, path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_what_was_there_and_a_file_with_the_name_of_a_partial_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    process = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(str(path),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and path.read_bytes() == b"before"
    assert [PARTIAL in file.name for file in tmp_path.iterdir() if file != path] == [True]
