"""The time limit of a sweep over several drivers and outages of the store, and early stoppers that learn from earlier drivers."""

import pickle

import pyarrow.fs as arrow_fs
import pytest
from ray import cloudpickle

from orchestrator.experiments.sweep_spec import AshaConfig, MedianConfig, NoStopperConfig
from orchestrator.sweeps import stopping
from orchestrator.sweeps.stages import BUDGET, SCORE
from orchestrator.sweeps.stopping import Deadline, SweepClock, make_scheduler
from orchestrator.sweeps.trial_result import TrialResult

LOCAL = arrow_fs.LocalFileSystem()


@pytest.fixture
def now(monkeypatch):
    """The process's clock, seconds; set `now[0]`."""
    time = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: time[0])
    return time


def test_the_next_driver_goes_on_counting(tmp_path, now):
    first = SweepClock(LOCAL, str(tmp_path / "hours"))
    deadline = Deadline(hours=1.0, clock=first)
    assert first.hours() == 0.0 and not deadline.stop_all()
    now[0] += 1800
    assert abs(first.hours() - 0.5) < 1e-9  # written, since more than ten seconds went by
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


def test_without_a_limit_nothing_is_read_or_written(tmp_path, now):
    deadline = Deadline(hours=None, clock=SweepClock(LOCAL, str(tmp_path / "gone" / "hours")))
    now[0] += 1e9
    assert not deadline.stop_all() and not list(tmp_path.iterdir())


def test_a_store_that_is_away_neither_ends_the_sweep_nor_resets_its_hours(tmp_path, now):
    folder, away = tmp_path / "sweep", tmp_path / "away"
    clock = SweepClock(LOCAL, str(folder / "hours"))
    clock.hours()
    now[0] += 1800
    assert clock.hours() == pytest.approx(0.5)
    folder.rename(away)
    folder.write_text("neither a folder that can be read nor one that can be written")
    now[0] += 1800
    assert not Deadline(hours=1.5, clock=clock).stop_all() and clock.hours() == pytest.approx(1.0)

    second = SweepClock(LOCAL, str(folder / "hours"))  # a driver that starts while the store is away
    now[0] += 360
    assert second.hours() == pytest.approx(0.1)
    folder.unlink()
    away.rename(folder)
    assert (folder / "hours").read_text() == "0.50000"
    now[0] += 360
    assert second.hours() == pytest.approx(0.7)
    now[0] += 360
    assert second.hours() == pytest.approx(0.8) and (folder / "hours").read_text() == "0.80000"


def test_a_kill_in_the_middle_of_a_write_costs_ten_seconds(tmp_path, now, monkeypatch):
    clock = SweepClock(LOCAL, str(tmp_path / "hours"))
    clock.hours()
    now[0] += 3600
    clock.hours()

    def killed(partial, path):
        raise SystemExit

    monkeypatch.setattr("os.replace", killed)
    now[0] += 10
    with pytest.raises(SystemExit):
        clock.hours()
    monkeypatch.undo()
    assert SweepClock(LOCAL, str(tmp_path / "hours")).hours() == pytest.approx(1.0, abs=1e-3)


def test_a_file_that_was_cut_counts_from_0_and_says_so(tmp_path, caplog):
    (tmp_path / "hours").write_text("")
    assert SweepClock(LOCAL, str(tmp_path / "hours")).hours() == pytest.approx(0, abs=1e-3)
    assert "is damaged; the hours of the sweep are counted from 0 again" in caplog.text


class Sweep:
    """As much of a stage as an early stopper reads."""

    def __init__(self, stopper):
        self.sweep, self.stopper, self.steps = self, stopper, 100

    def experiment(self, point):
        return self


class Earlier:
    """Trials that ended under earlier drivers with scores of 0.5 to 0.9 at step 10."""

    def __init__(self, stopper):
        self.stage = Sweep(stopper)

    def read(self):
        for number in range(5):
            score = {10: {"eval/sga": 0.5 + 0.1 * number}}
            yield TrialResult(point={}, experiment=None, run_name=str(number), evaluations=score, rank_by=("eval/sga",))


class Trial:
    trial_id = "own"


class Tune:
    @staticmethod
    def get_live_trials():
        return []


@pytest.mark.parametrize("stopper", [AshaConfig(first_step=10), MedianConfig(first_step=10)])
@pytest.mark.parametrize(("score", "decision"), [(0.1, "STOP"), (0.95, "CONTINUE")])
def test_an_early_stopper_learns_from_the_trials_of_earlier_drivers(stopper, score, decision):
    scheduler = cloudpickle.loads(
        cloudpickle.dumps(make_scheduler(Earlier(stopper)))
    )  # as Tune does when it is resumed
    trial = Trial()
    scheduler.on_trial_add(Tune(), trial)
    assert scheduler.on_trial_result(Tune(), trial, {BUDGET: 10, SCORE: score, "training_iteration": 1}) == decision


def test_without_an_early_stopper_every_trial_goes_on():
    scheduler = make_scheduler(Earlier(NoStopperConfig()))
    scheduler.on_trial_add(None, Trial())
    assert scheduler.on_trial_result(None, Trial(), {BUDGET: 10, SCORE: 0.1}) == "CONTINUE"
