"""Compares the hits of two runs on the same crops, with a paired bootstrap interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.runs.identity import begun_run
from orchestrator.sweeps.leaderboard import Trial
from orchestrator.sweeps.stages import Stage
from workloads.errors import RunFailedError
from workloads.evaluation.tables import hits_of
from workloads.metrics.grid_accuracy import SUITES, paired_difference
from workloads.storage.filesystems import read_bytes


class ComparisonError(RunFailedError):
    """Two runs cannot be compared; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteComparison:
    """One suite: shares of hits, over the same crops of the same images."""

    winner: tuple[float, ...]  # SGA by seed
    start: tuple[float, ...]
    difference: float  # of the means over seeds
    low: float  # of its 95 % interval over images
    high: float
    pixel: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The winner and the start, trained at full length with the same seeds, on the held-out images."""

    suites: Mapping[str, SuiteComparison]
    winner: Sequence[Trial]
    start: Sequence[Trial]

    @property
    def better(self) -> bool:
        """Whether the winner's gain is above 0 beyond its interval in every suite."""
        return all(suite.low > 0 for suite in self.suites.values())

    def lines(self) -> list[str]:
        """For people."""
        told = ["the start won"] if self.winner == self.start else []
        for name, suite in self.suites.items():
            told.append(
                f"{name}: winner {np.mean(suite.winner):.1%}, start {np.mean(suite.start):.1%}, paired difference "
                f"{100 * suite.difference:+.1f} [{100 * suite.low:+.1f}, {100 * suite.high:+.1f}]; "
                f"pixel {suite.pixel:.1%}, chance {suite.chance:.1%}"
            )
        return told


def compare(stage: Stage, *, winner: Sequence[Trial], start: Sequence[Trial]) -> Comparison:
    """Compare runs of two configurations by their hits on the same held-out crops; seeds are averaged crop by crop.

    Raises:
        ComparisonError: a run has not ended.
    """
    failed = [trial for trial in (*winner, *start) if not trial.ended]
    if failed:
        raise ComparisonError(f"run {failed[0].run_name} has not ended ({failed[0].reason or 'it was stopped'})")
    tables = {trial.run_name: read_hits(trial) for trial in (*winner, *start)}
    protocol = stage.sweep.evaluation.protocol
    figures = winner[0].evaluations[winner[0].step]
    suites = {}
    for suite in SUITES:
        ours = np.mean([tables[trial.run_name][suite] for trial in winner], axis=0)
        theirs = np.mean([tables[trial.run_name][suite] for trial in start], axis=0)
        difference, low, high = paired_difference(ours, theirs, protocol)
        prefix = "eval/" if suite == "plain" else f"eval/{suite}/"
        suites[suite] = SuiteComparison(
            winner=tuple(float(tables[trial.run_name][suite].mean()) for trial in winner),
            start=tuple(float(tables[trial.run_name][suite].mean()) for trial in start),
            difference=difference,
            low=low,
            high=high,
            pixel=figures[f"{prefix}pixel"],
            chance=figures[f"{prefix}chance"],
        )
    return Comparison(suites=suites, winner=winner, start=start)


def read_hits(trial: Trial) -> dict[str, np.ndarray]:
    """Suite → hits (N images, K crops) of the trial's last evaluation."""
    assert trial.experiment is not None
    run = begun_run(trial.experiment)
    assert run is not None
    name = f"grid_accuracy_step_{trial.step:07d}.npz"
    data = read_bytes(run.filesystem, f"{run.folder}/artifacts/step_{trial.step:08d}/report/{name}")
    return hits_of(data)
