"""`SweepProgress` shows a running sweep on the terminal: a line per trial, evaluation and failure, and a progress bar."""

from typing import Any

import rich
from ray.tune import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from orchestrator.sweeps.stages import BUDGET, SCORE, Stage


class SweepProgress(Callback):
    """Tune's callback. It prints to `rich.get_console()`, because Tune restores it from a pickle when a sweep is resumed."""

    def __init__(self, stage: Stage, *, total: int) -> None:
        self._stage, self._total = stage, total
        self._best: float | None = None
        self._numbers: dict[str, int] = {}  # trial id → number in the order of starts
        self._bar: Progress | None = None

    def get_state(self) -> dict[str, Any]:
        """What Tune stores for the next driver: the best score and the numbers of the trials."""
        return {"best": self._best, "numbers": self._numbers}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier driver."""
        self._best, self._numbers = state["best"], dict(state["numbers"])

    def setup(self, *rest: Any, **info: Any) -> None:
        """On a terminal, start the progress bar."""
        console = rich.get_console()
        if console.is_terminal:
            columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[best]}"), console=console)
            self._bar.add_task("trials", total=self._total, best="")
            self._bar.start()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Stop the progress bar; called after an error too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Move the progress bar; that of a resumed sweep starts with the trials that ended before."""
        if self._bar is not None:
            best = "" if self._best is None else f"best {self._best:.3f}"
            self._bar.update(self._bar.task_ids[0], completed=sum(t.is_finished() for t in trials), best=best)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the trial's point."""
        point = self._stage.point_of(trial.config)
        self._print(trial, "  ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print an evaluation."""
        score = result[SCORE]
        self._best = score if self._best is None else max(self._best, score)
        self._print(trial, f"step {result[BUDGET]}  score {score:.3f}  (best {self._best:.3f})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that the trial failed; the sweep continues."""
        self._print(trial, "failed")

    def _print(self, trial: Any, text: str) -> None:
        number = self._numbers.setdefault(trial.trial_id, len(self._numbers) + 1)
        rich.get_console().print(f"trial {number}/{self._total}  {text}", highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
