"""Compares the winner of a sweep with the baseline configuration (`compare`): hits on the same crops, paired bootstrap interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.runs.identity import begun_run
from orchestrator.sweeps.stages import Stage
from orchestrator.sweeps.trial_result import TrialResult
from workloads.errors import RunFailedError
from workloads.evaluation.tables import hits_of
from workloads.metrics.grid_accuracy import SUITES, paired_difference
from workloads.metrics.names import MetricName
from workloads.storage.filesystems import read_bytes


class ComparisonError(RunFailedError):
    """Two runs cannot be compared; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteComparison:
    """Shares of hits in one suite, over the same crops of the same images."""

    winner: tuple[float, ...]  # SGA of each seed
    baseline: tuple[float, ...]
    difference: float  # winner − baseline, of the means over seeds
    low: float  # bounds of its 95 % interval over images
    high: float
    pixel: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Winner and baseline configuration, trained at full length with the same seeds, on the held-out images."""

    suites: Mapping[str, SuiteComparison]
    winner: Sequence[TrialResult]
    baseline: Sequence[TrialResult]

    @property
    def better(self) -> bool:
        """Whether the winner's gain is above 0 beyond its interval in every suite."""
        return all(suite.low > 0 for suite in self.suites.values())

    def lines(self) -> list[str]:
        """A summary, one line per suite."""
        lines = ["the baseline configuration won"] if self.winner == self.baseline else []
        for name, suite in self.suites.items():
            lines.append(
                f"{name}: winner {np.mean(suite.winner):.1%}, baseline {np.mean(suite.baseline):.1%}, paired difference "
                f"{100 * suite.difference:+.1f} [{100 * suite.low:+.1f}, {100 * suite.high:+.1f}]; "
                f"pixel {suite.pixel:.1%}, chance {suite.chance:.1%}"
            )
        return lines


def compare(stage: Stage, *, winner: Sequence[TrialResult], baseline: Sequence[TrialResult]) -> Comparison:
    """Compare two configurations by the hits of their runs on the same held-out crops, averaged over seeds crop by crop.

    Raises:
        ComparisonError: a run has not ended.
    """
    failed = [trial for trial in (*winner, *baseline) if not trial.ended]
    if failed:
        raise ComparisonError(
            f"run {failed[0].run_name} has not ended ({failed[0].reason or 'it was stopped'}); --resume tries it again"
        )
    tables = {trial.run_name: read_hits(trial) for trial in (*winner, *baseline)}
    protocol = stage.sweep.evaluation.protocol
    metrics = winner[0].evaluations[winner[0].step]
    suites = {}
    for suite in SUITES:
        ours = np.mean([tables[trial.run_name][suite] for trial in winner], axis=0)
        theirs = np.mean([tables[trial.run_name][suite] for trial in baseline], axis=0)
        difference, low, high = paired_difference(ours, theirs, protocol)
        suites[suite] = SuiteComparison(
            winner=tuple(float(tables[trial.run_name][suite].mean()) for trial in winner),
            baseline=tuple(float(tables[trial.run_name][suite].mean()) for trial in baseline),
            difference=difference,
            low=low,
            high=high,
            pixel=metrics[str(MetricName("pixel", group=suite))],
            chance=metrics[str(MetricName("chance", group=suite))],
        )
    return Comparison(suites=suites, winner=winner, baseline=baseline)


def read_hits(trial: TrialResult) -> dict[str, np.ndarray]:
    """Suite → hits (N images, K crops) of the last evaluation of `trial`, which has ended."""
    assert trial.experiment is not None
    run = begun_run(trial.experiment)
    assert run is not None
    name = f"grid_accuracy_step_{trial.step:07d}.npz"
    data = read_bytes(run.filesystem, f"{run.folder}/artifacts/step_{trial.step:08d}/report/{name}")
    return hits_of(data)
