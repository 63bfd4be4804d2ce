"""A sweep's hours count over all of its drivers, and end it; and what people see of it."""

import io
import pickle

import pytest
from pyarrow.fs import LocalFileSystem
from rich.console import Console

from orchestrator.sweeps import progress as sweep_progress
from orchestrator.sweeps.progress import Clock, Deadline, SweepProgress
from orchestrator.sweeps.stages import BUDGET, SCORE


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


class Settings:
    """A stage whose trials' settings are their points."""

    @staticmethod
    def point_of(settings):
        return settings


class Trial:
    def __init__(self, number, *, finished=False):
        self.trial_id, self.config, self.finished = f"t{number}", {"objective.temperature": 0.1 * number}, finished

    def is_finished(self):
        return self.finished


@pytest.mark.parametrize("terminal", [True, False])
def test_what_people_see(terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    trials = [Trial(1, finished=True), Trial(2)]
    with SweepProgress(Settings(), console=console, total=2) as progress:
        progress.on_trial_start(0, trials, trials[0])
        progress.on_trial_result(0, trials, trials[0], {SCORE: 0.25, BUDGET: 4})
        progress.on_trial_start(0, trials, trials[1])
        progress.on_trial_error(0, trials, trials[1])
        progress.on_step_end(0, trials)
        stored = pickle.loads(pickle.dumps(progress))  # as Tune does; a later driver has a console of its own
        stored.on_trial_error(0, trials, trials[1])
    shown = screen.getvalue()
    for line in ("trial 1/2  temperature=0.1", "trial 1/2  step 4  score 0.250  (best 0.250)", "trial 2/2  failed"):
        assert line in shown
    bar = shown[shown.rfind("trials ") :] if terminal else ""
    assert ("1/2" in bar and "best 0.250" in bar) == terminal
    assert shown.count("failed") == 1
    assert ("\x1b" in shown) == terminal
