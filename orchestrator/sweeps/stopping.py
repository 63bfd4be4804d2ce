"""Stops trials early and sweeps in time: `make_scheduler` builds the early stopper of the config, `Deadline` ends a sweep.

Ray Tune pickles these objects, and `Stage` and `SweepProgress` with them, into the sweep's folder by the paths of their
modules. A sweep begun before one of these modules was moved therefore starts Tune anew, and continues its trials by name
(see `tuning`).
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as arrow_fs
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.experiments.sweep_spec import AshaConfig, MedianConfig
from orchestrator.sweeps.stages import BUDGET, SCORE, Stage
from orchestrator.sweeps.trial_result import TrialResult, read_result, snapshot_trials
from workloads.storage.filesystems import atomic_write, read_bytes

logger = logging.getLogger(__name__)

_WRITE_EVERY_S = 10.0


class SweepClock:
    """Hours that a sweep has run, summed over all of its drivers in a file of its storage.

    The file is replaced atomically every 10 seconds, so a kill costs at most these. While the store does not answer,
    the hours are counted in memory, and a file that could not be read yet is not overwritten.
    """

    def __init__(self, filesystem: arrow_fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._before: float | None = None  # hours of earlers drivers; None: not read yet
        self._started = time.monotonic()
        self._read_at = self._written_at = float("-inf")

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its stopper; the clock of the next driver starts from the file.
        return SweepClock, (self._filesystem, self._path)

    def hours(self) -> float:
        """Hours so far."""
        now = time.monotonic()
        if self._before is None and now - self._read_at >= _WRITE_EVERY_S:
            self._read_at, self._before = now, self._read()
            self._written_at = now
        hours = (self._before or 0.0) + (now - self._started) / 3600
        if self._before is not None and now - self._written_at >= _WRITE_EVERY_S:
            self._written_at = now
            self._write(hours)
        return hours

    def _read(self) -> float | None:
        try:
            return float(read_bytes(self._filesystem, self._path, attempts=1))
        except FileNotFoundError:
            return 0.0
        except ValueError:
            logger.warning("%s: is damaged; the hours of the sweep are counted from 0 again", self._path)
            return 0.0
        except OSError as error:
            logger.warning("%s: the hours of earlier drivers cannot be read yet (%s)", self._path, error)
            return None

    def _write(self, hours: float) -> None:
        try:
            with atomic_write(self._filesystem, self._path, attempts=1) as stream:
                stream.write(f"{hours:.5f}".encode())
        except OSError as error:
            logger.warning("%s: the hours of the sweep cannot be written now (%s)", self._path, error)


class Deadline(Stopper):
    """Ends all trials after `hours`; null: never."""

    def __init__(self, *, hours: float | None, clock: SweepClock) -> None:
        self._hours, self._clock = hours, clock

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop this one trial: no."""
        return False

    def stop_all(self) -> bool:
        """Whether the time is up."""
        return self._hours is not None and self._clock.hours() >= self._hours


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierTrials:
    """The trials of a stage that ended under earlier drivers, as Tune's snapshot in `folder` lists them."""

    stage: Stage
    filesystem: arrow_fs.FileSystem
    folder: str

    def read(self) -> Iterator[TrialResult]:
        """Their results. What Tune resumes is left out, because it reports its evaluations again."""
        for trial in snapshot_trials(self.filesystem, self.folder):
            if trial.status == Trial.TERMINATED:
                yield read_result(self.stage, self.stage.point_of(trial.config), reason=None, interrupted=False)


@dataclass(frozen=True)
class _EndedTrial:
    """Stands for a trial that ended under an earlier driver."""

    trial_id: str


class _Informed(FIFOScheduler):
    """Mixin of an early stopper: replays the evaluations of earlier trials before its first own trial.

    Tune stores the state of its searcher, but not that of its scheduler.
    """

    def __init__(self, earlier: EarlierTrials, **options: Any) -> None:
        super().__init__(**options)
        self._earlier: EarlierTrials | None = earlier

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Replay the earlier trials, the first time; then add `trial`."""
        earlier, self._earlier = self._earlier, None
        for ended in earlier.read() if earlier is not None else ():
            replayed = _EndedTrial(ended.run_name)
            super().on_trial_add(tune_controller, replayed)  # type: ignore[arg-type]
            for step in sorted(ended.evaluations):
                report = {BUDGET: step, SCORE: ended.score_at(step), "training_iteration": step}
                super().on_trial_result(tune_controller, replayed, report)  # type: ignore[arg-type]
        super().on_trial_add(tune_controller, trial)


class InformedAsha(_Informed, ASHAScheduler):
    """Asynchronous successive halving over the trials of all drivers."""


class InformedMedian(_Informed, MedianStoppingRule):
    """The median stopping rule over the trials of all drivers."""


def make_scheduler(earlier: EarlierTrials) -> TrialScheduler:
    """The early stopper that `sweep.stopper` of the stage asks for."""
    stage = earlier.stage
    common: dict[str, Any] = {"time_attr": BUDGET, "metric": SCORE, "mode": "max"}
    match stage.sweep.sweep.stopper:
        case AshaConfig() as asha:
            steps = stage.experiment({}).steps
            return InformedAsha(
                earlier, **common, max_t=steps, grace_period=asha.first_step, reduction_factor=asha.reduction
            )
        case MedianConfig() as median:
            return InformedMedian(
                earlier, **common, grace_period=median.first_step, min_samples_required=median.least_trials
            )
        case _:
            return FIFOScheduler()
