"""Closes the MLflow run of a run whose driver is gone."""

from collections.abc import Mapping

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import begun_run, finished_run, hold_run
from orchestrator.runs.journal import JournalReader
from orchestrator.runs.record import journal_of
from orchestrator.tracking.addresses import artifact_root, tracking_uri
from orchestrator.tracking.header import run_header
from orchestrator.tracking.sink import MlflowSink


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
