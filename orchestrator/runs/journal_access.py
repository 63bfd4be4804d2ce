"""A run's record outside the process that drives it: its journal, wherever the storage has it, and the end of what nobody drives."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.ray_support.errors import sentence
from orchestrator.runs.identity import Run, begun_run
from orchestrator.runs.journal import JournalReader, Record, parse_journal
from orchestrator.runs.journal_archive import JournalArchive, read_segments
from workloads.errors import ConfigError


def recorded(experiment: AnyExperiment) -> list[Record]:
    """The journal of a run as far as its storage has it; empty if the run never began."""
    run = begun_run(experiment)
    if run is None:
        return []
    if _is_local(experiment):
        return JournalReader(_local_journal(run)).read()
    return parse_journal(b"".join(read_segments(run.filesystem, f"{run.folder}/journal")), source=run.name)


def _is_local(experiment: AnyExperiment) -> bool:
    return "://" not in experiment.storage.path


def _local_journal(run: Run) -> Path:
    return Path(run.folder, "journal.jsonl")


@contextlib.contextmanager
def journal_of(experiment: AnyExperiment, run: Run) -> Iterator[Path]:
    """The run's journal on this machine: in the run's folder where that is local, else a copy that the storage follows."""
    if _is_local(experiment):
        yield _local_journal(run)
        return
    path = Path(tempfile.gettempdir(), f"orchestrator-{run.claim}", "journal.jsonl")
    try:
        archive = JournalArchive(path, run.filesystem, f"{run.folder}/journal").__enter__()
    except OSError as error:
        raise ConfigError(f"storage.path: {experiment.storage.path} cannot be read: {sentence(error)}") from None
    try:
        yield path
    finally:
        archive.__exit__()
