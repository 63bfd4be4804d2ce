"""A lease lets one process in, tells the one that lost it, and survives an outage; on a real S3 service."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from orchestrator.storage import lease as lease_module
from orchestrator.storage import object_store
from orchestrator.storage.lease import hold_lease, refuse_if_held
from orchestrator.storage.lock import HeldError, Holder, LockLostError
from tests.orchestrator.storage.conftest import use
from tests.s3_peer import FaultyProxy, S3Peer
from workloads.errors import DataError, StoreUnavailableError

pytest.importorskip("boto3")
LEASE_S, RENEW_S = 2.0, 0.1


@pytest.fixture
def lock(bucket: str) -> str:
    return f"s3://{bucket}/run/_lock"


@contextmanager
def held(uri: str, *, lease_s: float = LEASE_S) -> Iterator[lease_module.S3Lease]:
    with hold_lease(uri, what="testing", lease_s=lease_s, renew_s=RENEW_S) as lease:
        yield lease


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def process(uri: str, *, hold_s: float, lease_s: float = LEASE_S) -> Iterator[subprocess.Popen[str]]:
    """Another process that waits for a line before it takes the lease."""
    command = [sys.executable, "-m", "tests.orchestrator.storage.holder", uri, str(lease_s), str(RENEW_S), str(hold_s)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert line(child) == "ready"
        yield child
    finally:
        child.kill()
        child.wait()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def abandon(uri: str, *, namespace: str = "elsewhere") -> None:
    """Leave the claim of a process on another machine that is gone."""
    holder = replace(Holder.here(), host="far", namespace=namespace)
    claim = lease_module._Claim(token="of the dead", holder=holder, what="testing")
    assert object_store.put_if_absent(f"{uri}/00000001", claim.encode())


def names(uri: str) -> list[str]:
    return object_store.list_names(uri)


def test_a_live_holder_is_respected_named_and_leaves_nothing_behind(lock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # clocks of two machines may differ
    with held(lock):
        with pytest.raises(HeldError, match=r"another process is testing \(process \d+ on .+\); wait"), held(lock):
            pytest.fail("was held")
        with pytest.raises(HeldError):
            refuse_if_held(lock)
    assert names(lock) == []
    refuse_if_held(lock)
    with held(lock):
        pass


def test_the_lock_of_a_killed_process_is_taken_at_once_and_its_number_not_used_again(lock: str) -> None:
    with process(lock, hold_s=600) as child:
        go(child)
        assert line(child) == "in"
        child.kill()
        child.wait()
        with hold_lease(lock, what="testing", lease_s=600, renew_s=RENEW_S):
            assert "00000002" in names(lock)
    with held(lock):
        assert "00000003" in names(lock)


def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_taken_over_after_the_lease(lock: str) -> None:
    abandon(lock)
    began = time.monotonic()
    with held(lock):
        assert time.monotonic() - began >= LEASE_S


def test_of_processes_that_want_an_abandoned_lock_at_once_one_gets_it(lock: str) -> None:
    abandon(lock)
    with ExitStack() as stack:
        children = [stack.enter_context(process(lock, hold_s=4.0, lease_s=4.0)) for _ in range(3)]
        for child in children:
            go(child)
        answers = [line(child) for child in children]
        assert sorted(answers) == ["held", "held", "in"]
        assert line(children[answers.index("in")]) == "out"  # by its check at the end it was the holder all the time


def test_a_holder_that_was_cut_off_longer_than_its_lease_is_told_and_leaves_the_next_one_alone(
    lock: str, s3_peer: S3Peer, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(lock, hold_s=600) as other:  # its way to the store stays open
        use(monkeypatch, s3_peer.environment(endpoint=faulty.endpoint))
        told = threading.Event()
        with held(lock) as lease:
            lease.on_lost(told.set)
            lease.check()
            faulty.down = True
            go(other)
            assert line(other) == "in"
            with pytest.raises(StoreUnavailableError, match="still holds its lock is unknown"):
                lease.check()
            assert not lease.lost
            faulty.down = False
            assert told.wait(30)
            with pytest.raises(LockLostError, match="another process took over from this one, which was testing"):
                lease.check()
        use(monkeypatch, s3_peer.environment())
        with pytest.raises(HeldError), held(lock):
            pytest.fail("the other process holds it")
        assert other.poll() is None


def test_an_outage_for_everybody_costs_nobody_the_lock(
    lock: str, s3_peer: S3Peer, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, s3_peer.environment(endpoint=faulty.endpoint))
    with held(lock) as lease:
        faulty.down = True
        with pytest.raises(DataError), held(lock):
            pytest.fail("nobody can know that the holder is gone")
        time.sleep(LEASE_S)
        faulty.down = False
        lease.check()
        with pytest.raises(HeldError), held(lock):
            pytest.fail("was held")
        assert not lease.lost


@pytest.mark.parametrize("generation", [1, 2])
def test_letting_go_while_the_store_is_away_changes_no_result(
    lock: str, s3_peer: S3Peer, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, generation: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if generation == 2:
        abandon(lock)
    use(monkeypatch, s3_peer.environment(endpoint=faulty.endpoint))

    def work() -> str:
        with held(lock):
            faulty.down = True
            return "done"

    assert work() == "done"
    assert "not released" in caplog.text


def test_a_renewal_between_the_last_look_and_the_takeover_is_waited_out(
    lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old holder may believe that the lock is its own until that renewal has run out."""
    abandon(lock)
    real, renewed_at = object_store.put_if_absent, []

    def late_renewal(uri: str, data: bytes) -> bool:
        old = json.loads(object_store.get_object(f"{lock}/00000001") or b"")
        object_store.put_object(f"{lock}/00000001", json.dumps({**old, "renewals": 1}).encode())
        renewed_at.append(time.monotonic())
        return real(uri, data)

    monkeypatch.setattr(object_store, "put_if_absent", late_renewal)
    with held(lock):
        assert time.monotonic() - renewed_at[0] >= LEASE_S
