"""The phases of one `train` command."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training import run
from orchestrator.training.session import Stopwatch, TrainingError


class Sink:
    """A tracking store that answers when it is let, or never."""

    def __init__(self, error: Exception | None = None) -> None:
        self.answers, self._error = threading.Event(), error

    def connect(self) -> str:
        assert self.answers.wait(60)
        if self._error is not None:
            raise self._error
        return "0"


def session_of(sink: Sink) -> Any:
    return SimpleNamespace(
        sink=sink, watch=Stopwatch(0.0), experiment=None, uri="sqlite:///x.db", debug=False, fast_paths=False
    )


def test_a_trial_does_not_wait_for_the_tracking_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(run, "is_trial", lambda: True)
    sink = Sink()
    run._connect(session_of(sink))  # would not return before the store answers
    sink.answers.set()


def test_a_run_ends_if_the_tracking_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(run, "is_trial", lambda: False)
    sink = Sink(OSError("connection refused"))
    sink.answers.set()
    with pytest.raises(TrainingError, match="does not answer: connection refused"):
        run._connect(session_of(sink))
