"""`MlflowSink` writes a run's journal to MLflow. Only the driver does so, from one thread; several calls may repeat safely."""

import json
import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs as arrow_fs

from orchestrator.runs.records import ArtifactsRecord, MetricsRecord, Record, TagsRecord
from orchestrator.tracking.addresses import TrackingError, without_secrets
from orchestrator.tracking.client import quiet_mlflow
from orchestrator.tracking.header import CLAIM_TAG, RunHeader, dataset_label

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from orchestrator.tracking.private import SystemMetricsMonitor

logger = logging.getLogger(__name__)
HEADER_TAG = "run.header"
"""Tag of a run whose parameters, dataset inputs and config are all logged; its value is `complete`."""
MUST_AGREE_TOLERANCE = 1e-3  # relative above 1: with another number of threads sums are rounded differently
_MUST_AGREE = ("train/loss", "eval/")  # timings differ between attempts, results must not
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100  # MLflow's limits
_MISSING = re.compile(r"HTTP status 404|NO_SUCH_KEY|RESOURCE_NOT_FOUND|Path does not exist")
_LOCAL = arrow_fs.LocalFileSystem()


class MlflowSink:
    """Delivers journal records to one MLflow run, which is created, or found by its claim, at the first delivery."""

    def __init__(
        self,
        header: RunHeader,
        *,
        uri: str,
        artifact_root: str | None,
        filesystem: arrow_fs.FileSystem,
        run_folder: str,
        system_metrics: bool = False,
    ) -> None:
        self._header = header
        self._uri = uri
        self._artifact_root = artifact_root
        self._filesystem = filesystem
        self._run_folder = run_folder
        self._system_metrics = system_metrics
        self._monitor: SystemMetricsMonitor | None = None
        self._client: MlflowClient | None = None
        self._logged: dict[tuple[str, int], float] | None = None
        self._uploaded = _UploadedFiles(self)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._lock, self._connecting = threading.Lock(), threading.Lock()

    @property
    def client(self) -> "MlflowClient":
        """The client of the tracking store; `connect` or `open` was called before."""
        assert self._client is not None
        return self._client

    def write(self, records: Sequence[Record]) -> None:
        """Deliver `records`. A (key, step) that the run already has, and a file that it already has, is not sent again."""
        self.open()
        try:
            self._write_metrics([record for record in records if isinstance(record, MetricsRecord)])
        except Exception:
            self._logged = None  # the server may have stored what it did not acknowledge: ask it before the next try
            raise
        for record in records:
            match record:
                case ArtifactsRecord():
                    self._write_artifacts(record.folder)
                case TagsRecord():
                    for key, value in record.tags.items():
                        self.client.set_tag(self.open(), key, value)

    def open(self) -> str:
        """Create the MLflow run, or find it and complete its header; returns its id."""
        with self._lock:
            if self.run_id is None:
                self.run_id = self._open()
            return self.run_id

    def connect(self) -> str:
        """Reach the tracking store, and create its tables and the experiment where they are missing; returns the experiment's id."""
        with self._connecting:
            if self.experiment_id is None:
                quiet_mlflow()
                from mlflow import MlflowClient

                self._client = MlflowClient(tracking_uri=self._uri)
                self.experiment_id = self._experiment()
            return self.experiment_id

    def _open(self) -> str:
        experiment_id = self.connect()
        run = self._find()
        resumed = run is not None
        if run is None:
            run = self.client.create_run(experiment_id, run_name=self._header.name, tags=dict(self._header.tags))
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
        if run.data.tags.get(HEADER_TAG) != "complete":
            self._log_header(run)
        if self._system_metrics and self._monitor is None:
            from orchestrator.tracking.private import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=resumed, tracking_uri=self._uri)
            self._monitor.start()
        return run.info.run_id

    def _find(self) -> "Run | None":
        claim = f"tags.`{CLAIM_TAG}` = '{self._header.claim}'"
        matches = self.client.search_runs([self.connect()], claim, max_results=1)
        return matches[0] if matches else None

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._header.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name, artifact_location=self._artifact_root)
            except MlflowException:  # another run created it in between
                experiment = self.client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TrackingError(f"tracking.experiment: {name} is deleted on the server; restore it or choose another")
        return experiment.experiment_id

    def _log_header(self, run: "Run") -> None:
        """Log the parameters, dataset inputs and config that `run` lacks; the tag that says so comes last.

        The server may have died in the middle of an earlier call, or the run may be of a version without the tag.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run_id = run.info.run_id
        params = [Param(key, value) for key, value in self._header.params.items() if key not in run.data.params]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        if run.inputs is None or not run.inputs.dataset_inputs:
            inputs = []
            for use in self._header.datasets:
                name, kind = dataset_label(use.uri), "s3" if use.uri.startswith("s3://") else "local"
                source = json.dumps({"name": name})
                dataset = Dataset(name=name, digest=use.sha256[:36], source_type=kind, source=source)
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", use.context)]))
            self.client.log_inputs(run_id, datasets=inputs)
        if not self.client.list_artifacts(run_id, "config"):
            self.client.log_text(run_id, self._header.config_yaml, "config/experiment.yaml")
        self.client.set_tag(run_id, HEADER_TAG, "complete")

    def _write_metrics(self, records: Sequence[MetricsRecord]) -> None:
        from mlflow.entities import Metric

        logged = self._logged_metrics()
        fresh: dict[tuple[str, int], Metric] = {}
        for record in records:
            for key, value in record.metrics.items():
                known = logged.get((key, record.step))
                if known is None:
                    fresh.setdefault((key, record.step), Metric(key, value, record.time_ms, record.step))
                elif key.startswith(_MUST_AGREE) and abs(known - value) > MUST_AGREE_TOLERANCE * max(1.0, abs(known)):
                    logger.warning(
                        "%s at step %d: %g is logged, a later attempt has %g", key, record.step, known, value
                    )
        items = list(fresh.items())
        for start in range(0, len(items), _METRICS_PER_CALL):
            chunk = items[start : start + _METRICS_PER_CALL]
            self.client.log_batch(self.open(), metrics=[metric for _, metric in chunk])
            logged.update({position: metric.value for position, metric in chunk})

    def _logged_metrics(self) -> dict[tuple[str, int], float]:
        """(key, step) → value of everything the run has, read once."""
        if self._logged is None:
            logged: dict[tuple[str, int], float] = {}
            for key in self.client.get_run(self.open()).data.metrics:
                if not key.startswith("system/"):
                    history = self.client.get_metric_history(self.open(), key)
                    logged.update({(key, metric.step): metric.value for metric in history})
            self._logged = logged
        return self._logged

    def _write_artifacts(self, folder: str) -> None:
        """Copy the files of `folder`, in the run's storage, into the run's artifacts, unless they are there."""
        source = f"{self._run_folder}/{folder}"
        if folder in self._uploaded.folders:
            return
        with tempfile.TemporaryDirectory() as local:
            try:
                files = dict(_files_below(self._filesystem, source))
                upload = self._uploaded.lacks(files)
                if upload:
                    arrow_fs.copy_files(
                        source, local, source_filesystem=self._filesystem, destination_filesystem=_LOCAL
                    )
            except OSError as error:
                if not _is_missing(error):
                    raise
                files, upload = {}, False
            if not files:  # waiting would not bring it back, and would block the records behind it
                logger.warning("artifacts: %s is gone from the run's storage, so MLflow does not get it", folder)
            if upload:
                self.client.log_artifacts(self.open(), local)
        self._uploaded.folders.add(folder)

    def log_model(self, checkpoint: str, *, step: int) -> str:
        """Log the checkpoint folder `checkpoint` of the run's storage as the run's LoggedModel; returns the model's URI."""
        from orchestrator.tracking.models.logged_model import log_checkpoint

        return log_checkpoint(checkpoint, self._filesystem, run_id=self.open(), uri=self._uri, step=step)

    def log_folder(self, folder: Path, target: str) -> None:
        """Copy the files of a local folder into `target` of the run's artifacts."""
        self.client.log_artifacts(self.open(), str(folder), target)

    def close(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self.run_id is not None:
            self.client.set_terminated(self.run_id, status=status)

    def summary(self) -> tuple[str, Mapping[str, float]]:
        """The run's id and the newest value of every metric, without changing the run.

        Raises:
            TrackingError: the run is not in the tracking store.
        """
        self.connect()
        run = self.client.get_run(self.run_id) if self.run_id else self._find()
        if run is None:
            raise TrackingError(
                f"run {self._header.name} is not in {without_secrets(self._uri)}; give the tracking.uri it was logged to"
            )
        return run.info.run_id, dict(run.data.metrics)


class _UploadedFiles:
    """The files that a run's artifacts have, by folder; each folder is listed once, so that a restart sends nothing again."""

    def __init__(self, sink: MlflowSink) -> None:
        self._sink = sink
        self._listed: dict[str, dict[str, int | None]] = {}
        self.folders: set[str] = set()

    def lacks(self, files: Mapping[str, int]) -> bool:
        """Whether one of `files` (path → size) is not among the artifacts, or there with another size."""
        return any(self._sizes(path.rpartition("/")[0]).get(path) != size for path, size in files.items())

    def _sizes(self, folder: str) -> dict[str, int | None]:
        if folder not in self._listed:
            listed = self._sink.client.list_artifacts(self._sink.open(), folder or None)
            self._listed[folder] = {item.path: item.file_size for item in listed if not item.is_dir}
        return self._listed[folder]


def _files_below(filesystem: arrow_fs.FileSystem, folder: str) -> Iterator[tuple[str, int]]:
    """Path relative to `folder`, and size, of each file below it; none if there is no such folder."""
    for info in filesystem.get_file_info(arrow_fs.FileSelector(folder, recursive=True, allow_not_found=True)):
        if info.type == arrow_fs.FileType.File:
            yield info.path[len(folder) :].lstrip("/"), info.size


def _is_missing(error: OSError) -> bool:
    """Whether the storage answered that there is no such folder; an outage or a refusal may pass."""
    return isinstance(error, FileNotFoundError) or _MISSING.search(str(error)) is not None
