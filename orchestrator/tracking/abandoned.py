"""`close_abandoned_run` completes and closes the MLflow run of a training run that no process drives any more."""

from collections.abc import Mapping

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.runs.identity import begun_run, finished_run, hold_run
from orchestrator.runs.journal import JournalReader
from orchestrator.runs.journal_access import open_journal
from orchestrator.runs.records import TagsRecord
from orchestrator.tracking.addresses import artifact_root, tracking_uri
from orchestrator.tracking.header import DatasetUse, run_header
from orchestrator.tracking.sink import MlflowSink


def close_abandoned_run(experiment: AnyExperiment, *, status: str, tags: Mapping[str, str]) -> str | None:
    """Deliver the rest of the run's journal, set `tags`, and end the MLflow run with `status`.

    Returns:
        The MLflow run's id; None if the run never started or has finished.

    Raises:
        RunHeldError: a process drives the run.
    """
    with hold_run(experiment) as lock:
        run = begun_run(experiment)
        if run is None or finished_run(run):
            return None
        data = DatasetUse(context="training", uri=experiment.data.uri, sha256=run.manifest_sha256)
        sink = MlflowSink(
            run_header(experiment, run, datasets=[data], tags=tags),
            uri=tracking_uri(experiment),
            artifact_root=artifact_root(experiment),
            filesystem=run.filesystem,
            run_folder=run.folder,
        )
        with open_journal(experiment, run, lock=lock) as journal:
            sink.write([*JournalReader(journal).read(), TagsRecord(tags=tags)])
        sink.close(status)
        return sink.run_id
