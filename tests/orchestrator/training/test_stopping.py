"""How a run ends on request: SIGTERM, Tune's stop of a trial, Ctrl-C."""

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training import progress, run, stopping, trainer

WAITS = """
    import sys, time
    from orchestrator.training import stopping
    stopping.ask_to_stop = lambda claim: print("asked", claim, flush=True)
    try:
        with stopping.stop_on_sigterm("claim", grace_s=float(sys.argv[1])):
            print("running", flush=True)
            time.sleep(120)
    except stopping.GraceOverError:
        print("grace over", flush=True)
    time.sleep(120 if sys.argv[2] == "blocked" else 0)
"""


def started(grace_s: float, end: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(WAITS), str(grace_s), end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    return process


def test_workers_that_do_not_end_are_waited_for_no_longer_than_the_grace_period() -> None:
    assert started(1.0, "free").communicate(timeout=60)[0] == "asked claim\ngrace over\n"


def test_a_second_sigterm_ends_the_wait_at_once() -> None:
    process = started(3600.0, "free")
    assert process.stdout is not None and process.stdout.readline() == "asked claim\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "grace over\n" and process.returncode == 0


def test_after_the_grace_period_the_process_exits_whatever_it_waits_for() -> None:
    process = started(1.0, "blocked")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.endswith("grace over\n") and "failure.grace_s" in err


def test_a_run_that_ends_by_itself_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping.stop_on_sigterm("claim", grace_s=3600.0):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session whose trainer ends as Tune's stop of a trial and Ray's handler of Ctrl-C do."""

    class Stopped:
        def fit(self) -> None:
            raise SystemExit(0)

    @contextlib.contextmanager
    def nothing(*_: object, **__: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(trainer, "make_trainer", lambda *_: Stopped())
    monkeypatch.setattr(progress, "ProgressWatcher", nothing)
    return SimpleNamespace(
        run=SimpleNamespace(claim="c", name="r"),
        console=None,
        watch=SimpleNamespace(phase=nothing),
        experiment=SimpleNamespace(failure=SimpleNamespace(grace_s=30.0)),
    )


@pytest.mark.parametrize(("trial", "error"), [(True, SystemExit), (False, KeyboardInterrupt)])
def test_the_stop_of_a_trial_is_no_ctrl_c(
    session: Any, monkeypatch: pytest.MonkeyPatch, trial: bool, error: type[BaseException]
) -> None:
    monkeypatch.setattr(run, "is_trial", lambda: trial)
    with pytest.raises(error):
        run._fit(session, SimpleNamespace())  # type: ignore[arg-type]
