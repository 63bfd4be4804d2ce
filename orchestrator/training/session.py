"""The state that the phases of one `train` command share, and its outcome."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import Run
from orchestrator.tracking.sink import MlflowSink
from workloads.errors import RunFailedError
from workloads.storage.checkpoint_store import CheckpointStore

if TYPE_CHECKING:
    from orchestrator.training.attempts import Attempts


class TrainingError(RunFailedError):
    """The run failed; the message says why in one sentence."""


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
        """Time what happens inside."""
        start = time.time()
        try:
            yield
        finally:
            self.timings[f"startup/{name}_s"] = time.time() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What the phases of one `train` share."""

    experiment: AnyExperiment
    run: Run
    sink: MlflowSink
    journal: Path
    uri: str  # of the tracking store
    console: Any
    watch: Stopwatch
    debug: bool
    callbacks: Sequence[Any]  # of Ray Train, beside our own

    @property
    def checkpoints(self) -> CheckpointStore:
        """Where the run's checkpoints are."""
        return CheckpointStore(self.run.filesystem, f"{self.run.folder}/checkpoints")

    def saved_step(self) -> int:
        """The newest checkpoint's step; 0 without one, or where the storage does not say now."""
        with contextlib.suppress(OSError):
            return max(self.checkpoints.steps(), default=0)
        return 0

    def best_checkpoint(self) -> tuple[int, str]:
        """Step and place of the best checkpoint, or of the newest where none was measured."""
        newest = self.saved_step()
        return self.checkpoints.best() or (newest, self.checkpoints.path_of(newest))

    def attempts(self, command: str) -> "Attempts":
        """What `command` tries, for the driver and for Ray Train's controller."""
        from orchestrator.training.attempts import Attempts

        failure = self.experiment.failure
        return Attempts(
            command=command,
            journal=str(self.journal),
            storage=self.storage,
            retries=failure.retries,
            patience_s=failure.patience_s,
            is_elastic=self.experiment.scaling.is_elastic,
        )

    @property
    def storage(self) -> str:
        """URI of the run's folder."""
        return f"{self.experiment.storage.path.rstrip('/')}/{self.run.name}"
