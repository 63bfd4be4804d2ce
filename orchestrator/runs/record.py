"""A run's record outside the process that drives it: its journal, wherever the storage has it, and the end of what nobody drives."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import Run, begun_run, finished_run, hold_run
from orchestrator.runs.journal import JournalArchive, JournalReader, Record, parse_journal, read_segments
from orchestrator.tracking.sink import MlflowSink, artifact_root, run_header, tracking_uri
from orchestrator.training.failures import sentence
from workloads.config import ConfigError


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


def settle(experiment: AnyExperiment, *, status: str, tags: Mapping[str, str]) -> str | None:
    """End the record of a run that nobody drives any more: deliver the rest of its journal, set `tags` and `status`.

    Returns:
        The tracked run's id; None if the run never began, or has ended by itself.

    Raises:
        ConfigError: somebody drives it.
    """
    with hold_run(experiment):
        run = begun_run(experiment)
        if run is None or finished_run(run):
            return None
        header = run_header(
            experiment, run, manifests={"training": (experiment.data.uri, run.manifest_sha256)}, tags=tags
        )
        sink = MlflowSink(
            header,
            uri=tracking_uri(experiment),
            artifact_root=artifact_root(experiment),
            filesystem=run.filesystem,
            run_folder=run.folder,
        )
        with journal_of(experiment, run) as journal:
            sink.write([*JournalReader(journal).read(), {"kind": "tags", "tags": dict(tags)}])
        sink.close(status)
        return sink.run_id


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
