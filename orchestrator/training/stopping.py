"""Ends a run on SIGTERM: asks its workers for a checkpoint, and ends it without one when the grace period is nearly over."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from orchestrator.training.progress import ask_to_stop

_SHARE_OF_WORKERS = 2 / 3  # of the grace period; the rest is for the record, the locks and Ray's own end


class GraceOverError(BaseException):
    """The workers did not end in time, or a second SIGTERM came; raised in the main thread, past what handles exceptions."""


class StopRequest:
    """Whether SIGTERM asked this process to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether it did."""
        return self._asked.is_set()

    def set(self) -> None:
        """Note that it did."""
        self._asked.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until it does, for at most `timeout_s`."""
        self._asked.wait(timeout_s)


@contextlib.contextmanager
def stop_on_sigterm(claim: str, *, grace_s: float) -> Iterator[StopRequest]:
    """While the context lasts, SIGTERM asks the workers of the run `claim` to save and end.

    A second SIGTERM raises `GraceOverError`, and so does the first after most of `grace_s`. After all of it the process
    exits, whatever it waits for; its journal is on disk and is delivered by the next one. Other threads than the main one
    receive no signals, so there nothing changes.

    Raises:
        GraceOverError: the run did not end by itself.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    timers: list[threading.Timer] = []

    def on_sigterm(*_: object) -> None:
        if timers:
            raise GraceOverError
        # A signal again, because only a signal interrupts what the main thread waits for.
        timers.append(_timer(_SHARE_OF_WORKERS * grace_s, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        timers.append(_timer(grace_s, lambda: _exit(grace_s)))
        threading.Thread(target=_ask, args=(claim,), daemon=True).start()
        request.set()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield request
    except BaseException:
        for timer in timers[:1]:  # the last one stays: it limits what the process still does before its end
            timer.cancel()
        raise
    else:
        for timer in timers:
            timer.cancel()
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask(claim: str) -> None:
    with contextlib.suppress(Exception):  # Ray may be what is gone; the timers end the run all the same
        ask_to_stop(claim)


def _timer(after_s: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(after_s, action)
    timer.daemon = True
    timer.start()
    return timer


def _exit(grace_s: float) -> None:
    text = (
        f"error: asked to end {grace_s:g} s ago (failure.grace_s), exiting; give the same command again to continue\n"
    )
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text.encode())
    os._exit(1)
