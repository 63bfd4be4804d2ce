"""A lock on a local folder: one process at a time, by a file that is open for writing."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage.lock import HeldError, Holder
from orchestrator.storage.locks import hold, refuse_if_held
from workloads.errors import DataError

HOLD = """
import sys
from orchestrator.storage.locks import hold
with hold(sys.argv[1], what="testing"):
    sys.stdout.write("in\\n"); sys.stdout.flush()
    sys.stdin.readline()
"""


def test_a_dead_process_lets_go_and_a_live_one_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    refuse_if_held(folder, what="testing")
    assert not Path(folder).exists()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "in\n"
    named = rf"another process is testing \(process {child.pid} on .+\); wait for it"
    with pytest.raises(HeldError, match=named), hold(folder, what="testing"):
        pytest.fail("was held")
    with pytest.raises(HeldError, match=named):
        refuse_if_held(folder, what="testing")
    child.kill()
    child.wait()
    with hold(folder, what="testing") as lock:
        lock.check()
        assert not lock.lost
    refuse_if_held(folder, what="testing")


def test_the_lock_is_on_a_file_that_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS emulates flock by byte-range locks, and gives an exclusive one to a writable descriptor alone."""
    real = fcntl.flock

    def as_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with hold(str(tmp_path), what="testing"), pytest.raises(HeldError), hold(str(tmp_path), what="testing"):
        pytest.fail("was held")


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EIO])
def test_an_error_of_the_file_system_is_named_and_nobody_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(DataError, match=os.strerror(code)) as caught, hold(str(tmp_path), what="testing"):
        pytest.fail("was not locked")
    assert not isinstance(caught.value, HeldError) and "another process" not in str(caught.value)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a folder"), hold(str(tmp_path / "file" / "run"), what="testing"):
        pytest.fail("was not locked")


def test_a_holder_is_dead_only_where_its_process_would_be_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = Holder.here()
    gone = Holder(host=here.host, pid=child.pid, namespace=here.namespace)
    assert gone.is_dead() and not here.is_dead()
    assert not Holder(host=here.host, pid=child.pid, namespace="another container").is_dead()
