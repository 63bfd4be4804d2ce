"""What a sweep shows while it runs, and how long it may."""

import time
from typing import Any

import pyarrow.fs as arrow_fs
from ray.tune import Callback, Stopper

from orchestrator.sweeps.stages import BUDGET, SCORE, Stage
from workloads.storage.filesystems import atomic_write, read_bytes

_WRITE_EVERY_S = 10.0


class Clock:
    """Hours that a sweep has taken, over all of its drivers, in a file of its storage."""

    def __init__(self, filesystem: arrow_fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._before: float | None = None
        self._began = self._written = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its stopper; another driver's clock begins with what the file says.
        return {"_filesystem": self._filesystem, "_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_filesystem"], state["_path"])  # type: ignore[misc]

    def hours(self) -> float:
        """Hours so far; notes them now and then."""
        if self._before is None:
            self._before = self._read()
        now = time.monotonic()
        hours = self._before + (now - self._began) / 3600
        if now - self._written >= _WRITE_EVERY_S:
            self._written = now
            with atomic_write(self._filesystem, self._path) as stream:
                stream.write(f"{hours:.5f}".encode())
        return hours

    def _read(self) -> float:
        if self._filesystem.get_file_info(self._path).type != arrow_fs.FileType.File:
            return 0.0
        return float(read_bytes(self._filesystem, self._path) or b"0")


class Deadline(Stopper):
    """Ends all trials after so many hours."""

    def __init__(self, *, hours: float | None, clock: Clock) -> None:
        self._hours, self._clock = hours, clock

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether the time is up."""
        spent = self._clock.hours()
        return self._hours is not None and spent >= self._hours


class SweepProgress(Callback):
    """A line for each trial, evaluation and failure; on a terminal a bar over the trials below them."""

    def __init__(self, stage: Stage, *, console: Any, total: int) -> None:
        self._stage, self._console, self._total = stage, console, total
        self._best: float | None = None
        self._numbers: dict[str, int] = {}
        self._bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks; a later driver has a console of its own.
        return {
            "_stage": self._stage,
            "_console": None,
            "_total": self._total,
            "_best": None,
            "_numbers": {},
            "_bar": None,
        }

    def __enter__(self) -> "SweepProgress":
        if self._console is not None and self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[best]}"), console=self._console)
            self._bar.add_task("trials", total=self._total, best="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Move the bar; a continued sweep's begins with the trials that ended before."""
        if self._bar is not None:
            best = "" if self._best is None else f"best {self._best:.3f}"
            self._bar.update(self._bar.task_ids[0], completed=sum(t.is_finished() for t in trials), best=best)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say which point begins."""
        point = self._stage.point_of(trial.config)
        told = "  ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items())
        self._say(f"trial {self._number(trial)}/{self._total}  {told}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say what was measured."""
        self._best = max(self._best or 0.0, result[SCORE])
        told = f"step {result[BUDGET]}  score {result[SCORE]:.3f}  (best {self._best:.3f})"
        self._say(f"trial {self._number(trial)}/{self._total}  {told}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it failed; the sweep goes on."""
        self._say(f"trial {self._number(trial)}/{self._total}  failed")

    def _number(self, trial: Any) -> int:
        return self._numbers.setdefault(trial.trial_id, len(self._numbers) + 1)

    def _say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
