"""Writes a run's identity, journal and archive, killed at each sync and each rename in turn: `… EXPERIMENT.yaml FOLDER`."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow.fs import LocalFileSystem

from orchestrator.experiments.load import load_experiment
from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import Run, claim_run, finished_run, mark_finished
from orchestrator.runs.journal import Journal, JournalReader
from orchestrator.runs.journal_archive import JournalArchive, read_segments
from orchestrator.runs.records import MetricsRecord


def main() -> None:
    experiment, root = load_experiment(sys.argv[1], ["tracking.run_name=killed"]), Path(sys.argv[2])
    points, claims = 0, set()
    while True:
        points += 1
        if (child := os.fork()) == 0:
            die_at(points)
            write(experiment, root)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        claims.add(claim(experiment).claim)
        assert finished_run(claim(experiment)) in (None, "id")
        assert all(text.endswith(b"\n") for text in read_segments(LocalFileSystem(), str(root / "segments")))
        assert all(isinstance(record, MetricsRecord) for record in JournalReader(journal(root)).read())
    assert points > 8 and len(claims) == 1, (points, claims)
    assert finished_run(write(experiment, root)) == "id"


def claim(experiment: AnyExperiment) -> Run:
    return claim_run(experiment, manifest_sha256="0" * 64)


def journal(root: Path) -> Path:
    return root / "here" / "journal.jsonl"


def write(experiment: AnyExperiment, root: Path) -> Run:
    """All writes of a run's life, in order; in the middle another machine, which has no journal, goes on."""
    run = claim(experiment)
    archive(root)._restore()
    Journal(journal(root)).append(MetricsRecord(step=1, time_ms=1, metrics={"train/loss": 1.0}))
    one = archive(root)
    one._restore()
    one.push()
    journal(root).unlink()
    archive(root)._restore()
    mark_finished(run, "id")
    return run


def archive(root: Path) -> JournalArchive:
    return JournalArchive(journal(root), LocalFileSystem(), str(root / "segments"))


def die_at(n: int) -> None:
    """Kill this process at its `n`-th call that syncs or renames a file."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return call

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


if __name__ == "__main__":
    main()
