"""`S3Lease`: a lock in an object store that its holder renews, made of conditional writes and without comparing clocks.

Below the lock's URI lies one small object for each generation: `00000001`, `00000002`, … The holder is whoever created
the newest. A generation is created with `If-None-Match: *`, so of several contenders one succeeds; `If-Match`, which would
allow a single object, is refused by OpenStack Swift. Because Swift does not check and write in one step, a contender waits
for a moment after that and goes on only if the object is still its own.

The holder rewrites its object every `renew_s`. A contender creates the next generation if the newest one is released, if
its process is known to have died, if it has not been renewed for `_ABANDONED_S` by the store's own clock, or if the
contender, able to read the store all the time, sees it unchanged for `lease_s`. While the store is away for everybody
nobody can take the lock, so the holder continues with it afterwards. A holder that was cut off alone learns of its loss at
its next renewal (`Lock.on_lost`); from `lease_s` after its last renewal on, `check` raises until it has renewed.

The takeover itself is safe by order: the holder writes its own object and then looks for the next one; the contender
creates the next one and then looks at the holder's. One of them sees the other. A contender that finds the old holder's
object renewed in between waits until that renewal has run out, too.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from orchestrator.storage import object_store
from orchestrator.storage.lock import HeldError, Holder, Lock, LockLostError
from workloads.errors import DataError, StoreUnavailableError

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""A contender that sees no renewal for so long, while it can read the store, takes the lock over."""
RENEW_S = 5.0
_ABANDONED_S = 900.0  # longer than any outage that a run is promised to survive (`failure.patience_s`)
_SETTLE_S = 1.0  # longer than the writes of contenders at the same moment take
_TRIES = 5  # of creating the next generation while others create it too


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """The content of a generation's object."""

    token: str
    holder: Holder
    what: str
    renewals: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest generation as a contender read it."""

    generation: int
    claim: _Claim | None  # None if its content is unreadable
    age_s: float  # since its last renewal, by the store's clock

    @property
    def is_free(self) -> bool:
        return self.claim is not None and (self.claim.released or self.claim.holder.is_dead())


class S3Lease(Lock):
    """The lock of generation `generation`, renewed by a thread until `release`."""

    def __init__(self, uri: str, generation: int, claim: _Claim, *, lease_s: float, renew_s: float) -> None:
        self._uri, self._generation, self._claim = uri, generation, claim
        self._lease_s = lease_s
        self._renewed_at = _now()
        self._lost, self._stop = threading.Event(), threading.Event()
        self._actions: list[Callable[[], None]] = []
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(renew_s,), name="s3-lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def on_lost(self, action: Callable[[], None]) -> None:
        self._actions.append(action)
        if self.lost:
            action()

    def check(self) -> None:
        if not self.lost and _now() - self._renewed_at >= self._lease_s:
            try:
                self._renew()
            except DataError as error:
                raise StoreUnavailableError(f"{error}; whether this process still holds its lock is unknown") from None
        if self.lost:
            raise LockLostError(
                f"{self._uri}: another process took over from this one, which was {self._claim.what} and could not "
                f"reach the store for {self._lease_s:.0f} s; this one stops, and the other one continues"
            )

    def release(self) -> None:
        """Let others take the lock at once; if the store does not answer, they take it after the lease."""
        self._stop.set()
        self._thread.join(2 * object_store.QUICK_TIMEOUT_S)
        if self.lost:
            return
        try:
            # No earlier holder can write the first generation, and this one no longer does, unless a renewal still hangs.
            if self._generation == 1 and not self._thread.is_alive():
                object_store.delete_object(_key(self._uri, 1), quick=True)
            else:
                self._write(replace(self._claim, released=True))
        except DataError as error:
            logger.warning("lock: not released, others wait %.0f s for it: %s", self._lease_s, error)

    def _run(self, renew_s: float) -> None:
        while not self._stop.wait(renew_s) and not self.lost:
            try:
                self._renew()
            except DataError as error:
                logger.debug("lock: not renewed: %s", error)

    def _renew(self) -> None:
        with self._mutex:
            if self.lost:
                return
            started = _now()
            own = _parse(object_store.get_object(_key(self._uri, self._generation), quick=True))
            if own is not None and own.token == self._claim.token:
                self._write(replace(self._claim, renewals=self._claim.renewals + 1))
                if object_store.get_object(_key(self._uri, self._generation + 1), quick=True) is None:
                    self._renewed_at = started
                    return
            self._lost.set()
        logger.warning("lock: %s was taken over by another process", self._uri)
        for action in self._actions:
            action()

    def _write(self, claim: _Claim) -> None:
        object_store.put_object(_key(self._uri, self._generation), claim.encode(), quick=True)
        self._claim = claim


@contextmanager
def hold_lease(uri: str, *, what: str, lease_s: float = LEASE_S, renew_s: float = RENEW_S) -> Iterator[S3Lease]:
    """Hold the lock at `uri` while the context lasts; waits up to `lease_s` for a holder that may be dead.

    Args:
        what: what the holder does, for the message to others ("training run 'x'").

    Raises:
        HeldError: another process holds it.
        DataError: the store cannot be used.
    """
    claim = _Claim(token=uuid.uuid4().hex, holder=Holder.here(), what=what)
    generation, previous = _acquire(uri, claim, lease_s=lease_s, poll_s=min(1.0, renew_s / 2))
    _remove_older(uri, generation)
    lease = S3Lease(uri, generation, claim, lease_s=lease_s, renew_s=renew_s)
    try:
        if previous is not None and not previous.is_free and _read(uri, previous.generation) != previous.claim:
            time.sleep(lease_s)  # it was renewed after it had been seen for the last time
            lease.check()
        yield lease
    finally:
        lease.release()


def refuse_if_held(uri: str) -> None:
    """Return at once if nobody holds the lock at `uri`, and within seconds if its holder gives no sign of life.

    Raises:
        HeldError: another process holds it.
        DataError: the store cannot be read.
    """
    newest = _newest(uri)
    if newest is not None and not newest.is_free and newest.age_s < _ABANDONED_S:
        _wait_for_sign_of_life(uri, newest, lease_s=1.5 * RENEW_S, poll_s=1.0)


def _acquire(uri: str, claim: _Claim, *, lease_s: float, poll_s: float) -> tuple[int, _Seen | None]:
    """Create the next generation once the newest one is free; returns its number, and the one before as it was seen last."""
    for _ in range(_TRIES):
        newest = _newest(uri)
        if newest is not None and not newest.is_free and newest.age_s < _ABANDONED_S:
            newest = _wait_for_sign_of_life(uri, newest, lease_s=lease_s, poll_s=poll_s)
        generation = newest.generation + 1 if newest is not None else 1
        if object_store.put_if_absent(_key(uri, generation), claim.encode()):
            time.sleep(min(_SETTLE_S, lease_s / 4))
        mine = _read(uri, generation)  # also tells whether it was written although the answer was lost
        if mine is not None and mine.token == claim.token:
            return generation, newest
    raise HeldError(f"{uri}: several processes want this lock at once; give the command again")


def _wait_for_sign_of_life(uri: str, seen: _Seen, *, lease_s: float, poll_s: float) -> _Seen | None:
    """Return the newest generation once it is free or has not changed for `lease_s`.

    Raises:
        HeldError: its holder renewed it.
        DataError: the store cannot be read, so nobody knows whether the holder lives.
    """
    doing = seen.claim.what if seen.claim else "using it"
    who = f" ({seen.claim.holder})" if seen.claim else ""
    deadline, told_at = time.monotonic() + lease_s, time.monotonic() + 2 * RENEW_S
    told = False
    while time.monotonic() < deadline:
        time.sleep(poll_s)
        now = _newest(uri)
        if now is None or (now.generation == seen.generation and now.is_free):
            return now
        if now.generation != seen.generation or now.claim != seen.claim:
            raise HeldError(f"{uri}: another process is {doing}{who}; wait for it to end")
        if not told and time.monotonic() > told_at:
            told = True
            logger.warning(
                "%s: the process that was %s%s gives no sign of life; its lock is taken over after %.0f s",
                *(uri, doing, who, lease_s),
            )
    return seen


def _newest(uri: str) -> _Seen | None:
    generations = [int(name) for name in object_store.list_names(uri) if name.isdecimal()]
    if not generations:
        return None
    generation = max(generations)
    found = object_store.get_with_age(_key(uri, generation))
    if found is None:  # removed by the holder of a newer one, which the listing did not have yet
        return _Seen(generation, None, 0.0)
    body, age_s = found
    return _Seen(generation, _parse(body), age_s)


def _remove_older(uri: str, generation: int) -> None:
    with suppress(DataError):
        for name in object_store.list_names(uri):
            # The last two stay, so that an earlier holder finds the next one however late it looks.
            if name.isdecimal() and int(name) < generation - 2:
                object_store.delete_object(f"{uri}/{name}")


def _now() -> float:
    """Seconds that also pass while the machine is suspended, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _read(uri: str, generation: int) -> _Claim | None:
    return _parse(object_store.get_object(_key(uri, generation)))


def _key(uri: str, generation: int) -> str:
    return f"{uri}/{generation:08d}"


def _parse(body: bytes | None) -> _Claim | None:
    try:
        fields = json.loads(body or b"")
        holder = Holder.parse(fields["holder"])
        return None if holder is None else _Claim(**{**fields, "holder": holder})
    except (ValueError, TypeError, KeyError):
        return None
