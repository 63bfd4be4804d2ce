"""What a running sweep prints, and what of it a later driver takes over."""

import io
import pickle

import pytest
import rich

from orchestrator.sweeps.progress import SweepProgress
from orchestrator.sweeps.stages import BUDGET, SCORE


class Points:
    """A stage whose trials' configs are their points."""

    @staticmethod
    def point_of(settings):
        return settings


class Trial:
    def __init__(self, number, *, finished=False):
        self.trial_id, self.config, self.finished = f"t{number}", {"objective.temperature": 0.1 * number}, finished

    def is_finished(self):
        return self.finished


@pytest.fixture
def screen():
    """What the process's console prints."""
    console = dict(rich.get_console().__dict__)
    yield io.StringIO()
    rich.get_console().__dict__ = console


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed(screen, terminal):
    rich.reconfigure(file=screen, force_terminal=terminal, width=120)
    progress, trials = SweepProgress(Points(), total=2), [Trial(1, finished=True), Trial(2)]
    progress.setup()
    progress.on_trial_start(0, trials, trials[0])
    progress.on_trial_result(0, trials, trials[0], {SCORE: 0.25, BUDGET: 4})
    progress.on_trial_start(0, trials, trials[1])
    progress.on_trial_error(0, trials, trials[1])
    progress.on_step_end(0, trials)
    progress.on_experiment_end(trials)
    shown = screen.getvalue()
    for line in ("trial 1/2  temperature=0.1", "trial 1/2  step 4  score 0.250  (best 0.250)", "trial 2/2  failed"):
        assert line in shown
    bar = shown[shown.rfind("trials ") :] if terminal else ""
    assert ("1/2" in bar and "best 0.250" in bar) == terminal
    assert ("\x1b" in shown) == terminal


def test_the_next_driver_goes_on_with_numbers_and_best(screen):
    rich.reconfigure(file=screen, width=120)
    first, trials = SweepProgress(Points(), total=3), [Trial(1), Trial(2), Trial(3)]
    stored = pickle.dumps(first)  # as Tune does when a sweep begins
    for trial, score in zip(trials[:2], (-0.5, -0.75), strict=True):
        first.on_trial_result(0, trials, trial, {SCORE: score, BUDGET: 4})
    assert "trial 2/3  step 4  score -0.750  (best -0.500)" in screen.getvalue()
    second = pickle.loads(stored)
    second.set_state(pickle.loads(pickle.dumps(first.get_state())))  # as Tune does when it is resumed
    second.on_trial_result(0, trials, trials[2], {SCORE: -0.9, BUDGET: 4})
    assert "trial 3/3  step 4  score -0.900  (best -0.500)" in screen.getvalue()
