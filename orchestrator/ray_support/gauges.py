"""Exports a run's Prometheus gauges (`RunGauges`) and counts its faults, through Ray's metrics agent on each node.

Gauges are set when the run reports, not at every step. A local Ray exports none.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

_OF_A_REPORT = {
    "train/images_per_s": ("orchestrator_images_per_second", "Images trained per second, over all workers."),
    "train/data_wait_share": ("orchestrator_data_wait_share", "Share of the time that steps waited for data."),
    "train/step_s": ("orchestrator_step_seconds", "Seconds of one step."),
    "train/loss": ("orchestrator_loss", "Training loss."),
}


class RunGauges:
    """The gauges of one run; an error in setting them never reaches the run."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run}
        described = {
            **_OF_A_REPORT,
            "step": ("orchestrator_step", "Steps done."),
            "checkpoint_age": ("orchestrator_checkpoint_age_seconds", "Seconds since the newest complete checkpoint."),
        }
        self._gauges: dict[str, Any] = {
            key: Gauge(name, description=description, tag_keys=("run",))
            for key, (name, description) in described.items()
        }
        self._saved: tuple[int | None, float] = (None, time.time())

    def report(self, metrics: Mapping[str, float], *, step: int, saved_step: int | None) -> None:
        """Set the gauges to the figures at `step`."""
        if saved_step != self._saved[0]:
            self._saved = (saved_step, time.time())
        values = {"step": float(step), "checkpoint_age": time.time() - self._saved[1], **metrics}
        with contextlib.suppress(Exception):
            for key, gauge in self._gauges.items():
                if key in values:
                    gauge.set(float(values[key]), tags=self._tags)


def count_fault(run: str, kind: str) -> None:
    """Count one more fault of this kind."""
    from ray.util.metrics import Counter

    with contextlib.suppress(Exception):
        Counter("orchestrator_faults", description="Faults of runs, by kind.", tag_keys=("run", "kind")).inc(
            1.0, tags={"run": run, "kind": kind}
        )
