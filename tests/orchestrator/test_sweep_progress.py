"""A sweep's hours count over all of its drivers, and end it."""

import pickle

from pyarrow.fs import LocalFileSystem

from orchestrator import sweep_progress
from orchestrator.sweep_progress import Clock, Deadline


def test_the_next_driver_goes_on_counting(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    first = Clock(LocalFileSystem(), str(tmp_path / "hours"))
    deadline = Deadline(hours=1.0, clock=first)
    assert first.hours() == 0.0 and not deadline.stop_all()
    now[0] += 1800
    assert abs(first.hours() - 0.5) < 1e-9  # and it is noted, since more than ten seconds went by
    now[0] += 5
    stored = pickle.dumps(deadline)

    now[0] = 50.0  # another machine's clock
    restored = pickle.loads(stored)
    assert not restored.stop_all()
    now[0] += 1799
    assert not restored.stop_all()
    now[0] += 2
    assert restored.stop_all()
    assert not restored("a trial", {"step": 3})


def test_without_a_limit_it_never_ends(tmp_path):
    assert not Deadline(hours=None, clock=Clock(LocalFileSystem(), str(tmp_path / "hours"))).stop_all()
