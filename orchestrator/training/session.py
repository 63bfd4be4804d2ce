"""Holds the state that the phases of one `train` command share (`Session`), their times (`Stopwatch`) and its `TrainOutcome`."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import Run
from orchestrator.storage.lock import Lock
from orchestrator.tracking.sink import MlflowSink
from workloads.errors import RunFailedError
from workloads.storage.checkpoint_store import CheckpointStore

if TYPE_CHECKING:
    from ray.train import UserCallback

    from orchestrator.training.attempts import Attempts


class TrainingError(RunFailedError):
    """A run failed; the message says why in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """A finished run."""

    run: Run
    run_id: str
    address: str
    metrics: Mapping[str, float]


class Stopwatch:
    """Seconds of each phase before the first step."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.timings: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the time of the block as `startup/<name>_s`."""
        start = time.time()
        try:
            yield
        finally:
            self.timings[f"startup/{name}_s"] = time.time() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One `train` command: its experiment, its run, and where it records."""

    experiment: AnyExperiment
    run: Run
    lock: Lock
    sink: MlflowSink
    journal: Path
    uri: str  # of the tracking store
    console: Console
    watch: Stopwatch
    debug: bool
    fast_paths: bool  # whether private interfaces of Ray are used, see `ray_support.session.uses_fast_paths`
    callbacks: "Sequence[UserCallback]"  # of the caller, beside the journal's

    @property
    def checkpoints(self) -> CheckpointStore:
        """Where the run's checkpoints are."""
        return CheckpointStore(self.run.filesystem, f"{self.run.folder}/checkpoints")

    def saved_step(self) -> int:
        """The newest checkpoint's step; 0 without one, or if the storage does not answer."""
        with contextlib.suppress(OSError):
            return max(self.checkpoints.steps(), default=0)
        return 0

    def best_checkpoint(self) -> tuple[int, str]:
        """Step and path of the best checkpoint, or of the newest if none was measured."""
        newest = self.saved_step()
        return self.checkpoints.best() or (newest, self.checkpoints.path_of(newest))

    def attempts(self, command: str) -> "Attempts":
        """The attempts of `command`, for the driver and for Ray Train's controller."""
        from orchestrator.training.attempts import Attempts

        failure = self.experiment.failure
        return Attempts(
            command=command,
            journal=str(self.journal),
            storage=self.storage,
            retries=failure.retries,
            patience_s=failure.patience_s,
        )

    @property
    def storage(self) -> str:
        """URI of the run's folder."""
        return f"{self.experiment.storage.path.rstrip('/')}/{self.run.name}"
