"""Opens the journal of a run that this process drives (`open_journal`), and reads that of any other run (`read_records`)."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.ray_support.errors import sentence
from orchestrator.runs.identity import Run, begun_run
from orchestrator.runs.journal import JournalReader, parse_journal
from orchestrator.runs.journal_archive import JournalArchive, read_segments
from orchestrator.runs.records import Record
from orchestrator.storage.lock import Lock
from workloads.errors import ConfigError


def read_records(experiment: AnyExperiment) -> list[Record]:
    """The records of the experiment's run that have reached its storage; empty if the run never started."""
    run = begun_run(experiment)
    if run is None:
        return []
    if _is_local(experiment):
        return JournalReader(_local_journal(run)).read()
    return parse_journal(b"".join(read_segments(run.filesystem, f"{run.folder}/journal")), source=run.name)


@contextlib.contextmanager
def open_journal(experiment: AnyExperiment, run: Run, *, lock: Lock) -> Iterator[Path]:
    """Path of the run's journal on this machine.

    Where the run's storage is local, the journal lies in the run's folder. Else it lies in a temporary folder and
    `JournalArchive` copies it to the storage; the folder is removed once all of it is there.

    Args:
        lock: the run's, without which nothing is copied.

    Raises:
        ConfigError: the storage cannot be read.
    """
    if _is_local(experiment):
        yield _local_journal(run)
        return
    path = Path(tempfile.gettempdir(), f"orchestrator-{run.claim}", "journal.jsonl")
    archive = JournalArchive(path, run.filesystem, f"{run.folder}/journal", check=lock.check)
    try:
        archive.start()
    except OSError as error:
        raise ConfigError(f"storage.path: {experiment.storage.path} cannot be read: {sentence(error)}") from None
    try:
        yield path
    finally:
        if archive.close():
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_local(experiment: AnyExperiment) -> bool:
    return "://" not in experiment.storage.path


def _local_journal(run: Run) -> Path:
    return Path(run.folder, "journal.jsonl")
