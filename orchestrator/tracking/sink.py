"""The run's record in MLflow. Only the driver writes it, from one thread, out of the journal."""

import json
import logging
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs

from orchestrator.runs.journal import Record
from orchestrator.tracking.addresses import TrackingError, quiet_mlflow, without_secrets
from orchestrator.tracking.header import CLAIM_TAG, RunHeader

logger = logging.getLogger(__name__)
_LARGEST_BATCH = 1000  # MLflow's limit of metrics in one call
_MUST_AGREE = ("train/loss", "eval/")  # timings differ between attempts, results must not
MUST_AGREE_TOLERANCE = 1e-3  # relative above 1: other thread counts add in another order


class MlflowSink:
    """Delivers journal records to one MLflow run, which is made, or found by its claim, at the first delivery."""

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
        self._monitor: Any = None
        self._client: Any = None
        self._seen: dict[tuple[str, int], float] | None = None
        self._artifacts_seen: set[str] = set()
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._lock, self._connecting = threading.Lock(), threading.Lock()

    def write(self, records: Sequence[Record]) -> None:
        """Deliver `records`; a (key, step) that the run already has is not logged again."""
        self.open()
        try:
            metrics = [record for record in records if record["kind"] == "metrics"]
            self._write_metrics(metrics)
        except Exception:
            self._seen = None  # the server may have taken what it did not acknowledge: ask it before trying again
            raise
        for record in records:
            if record["kind"] == "artifacts":
                self._write_artifacts(record["folder"])
            elif record["kind"] == "tags":
                for key, value in record["tags"].items():
                    self._client.set_tag(self.run_id, key, value)

    def open(self) -> str:
        """Make the run, or find it again; returns its id."""
        with self._lock:
            if self.run_id is None:
                self._open()
            assert self.run_id is not None
            return self.run_id

    def connect(self) -> None:
        """Reach the tracking store, and make its tables and the experiment where they do not exist."""
        with self._connecting:
            if self.experiment_id is None:
                quiet_mlflow()
                from mlflow import MlflowClient

                self._client = MlflowClient(tracking_uri=self._uri)
                self.experiment_id = self._experiment()

    def _open(self) -> None:
        if self.experiment_id is None:
            self.connect()
        experiment_id = self.experiment_id
        assert experiment_id is not None
        found = self._find()
        if found is not None:
            run_id = found.info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._create(experiment_id)
        self.run_id = run_id
        if self._system_metrics:
            self._start_monitor(run_id, resume=found is not None)

    def _find(self) -> Any:
        claim = f"tags.`{CLAIM_TAG}` = '{self._header.claim}'"
        found = self._client.search_runs([self.experiment_id], claim, max_results=1)
        return found[0] if found else None

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._header.experiment)
        if found is None:
            try:
                return self._client.create_experiment(self._header.experiment, artifact_location=self._artifact_root)
            except MlflowException:  # another run was faster
                found = self._client.get_experiment_by_name(self._header.experiment)
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(f"tracking.experiment: {self._header.experiment} is deleted on the server; restore it")
        return found.experiment_id

    def _create(self, experiment_id: str) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        tags = dict(self._header.tags)
        run_id = self._client.create_run(experiment_id, run_name=self._header.name, tags=tags).info.run_id
        params = [Param(key, value) for key, value in self._header.params.items()]
        for start in range(0, len(params), 100):  # MLflow's limit of parameters in one call
            self._client.log_batch(run_id, params=params[start : start + 100])
        inputs = [
            DatasetInput(
                Dataset(name=name, digest=digest, source_type=kind, source=json.dumps({"name": name})),
                [InputTag("mlflow.data.context", context)],
            )
            for context, name, digest, kind in self._header.datasets
        ]
        self._client.log_inputs(run_id, datasets=inputs)
        self._client.log_text(run_id, self._header.config_yaml, "config/experiment.yaml")
        return run_id

    def _start_monitor(self, run_id: str, *, resume: bool) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, resume_logging=resume, tracking_uri=self._uri)
        self._monitor.start()

    def _write_metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        seen = self._load_seen()
        fresh: dict[tuple[str, int], Metric] = {}
        for record in records:
            for key, value in record["metrics"].items():
                known = seen.get((key, record["step"]))
                if known is None:
                    fresh.setdefault((key, record["step"]), Metric(key, value, record["time_ms"], record["step"]))
                elif key.startswith(_MUST_AGREE) and abs(known - value) > MUST_AGREE_TOLERANCE * max(1.0, abs(known)):
                    logger.warning("%s at step %d: kept %g, a later attempt says %g", key, record["step"], known, value)
        items = list(fresh.items())
        for start in range(0, len(items), _LARGEST_BATCH):
            chunk = items[start : start + _LARGEST_BATCH]
            self._client.log_batch(self.run_id, metrics=[metric for _, metric in chunk])
            seen.update({place: metric.value for place, metric in chunk})

    def _load_seen(self) -> dict[tuple[str, int], float]:
        if self._seen is None:
            seen: dict[tuple[str, int], float] = {}
            for key in self._client.get_run(self.run_id).data.metrics:
                if not key.startswith("system/"):
                    history = self._client.get_metric_history(self.run_id, key)
                    seen.update({(key, metric.step): metric.value for metric in history})
            self._seen = seen
        return self._seen

    def _write_artifacts(self, folder: str) -> None:
        """Copy `folder` of the run's storage into the run's artifacts."""
        if folder in self._artifacts_seen:
            return
        with tempfile.TemporaryDirectory() as local:
            source = f"{self._run_folder}/{folder}"
            arrow_fs.copy_files(source, local, source_filesystem=self._filesystem, destination_filesystem=_LOCAL)
            self._client.log_artifacts(self.run_id, local)
        self._artifacts_seen.add(folder)

    def log_model(self, checkpoint: str, *, step: int) -> str:
        """Keep the model of the folder `checkpoint` of the run's storage with the run, as a LoggedModel; returns its URI."""
        from orchestrator.tracking.model import log_checkpoint

        return log_checkpoint(checkpoint, self._filesystem, run_id=self.open(), uri=self._uri, step=step)

    def log_folder(self, folder: Path, place: str) -> None:
        """Keep the files of a local folder among the run's artifacts, in `place`."""
        self._client.log_artifacts(self.open(), str(folder), place)

    def share_view(self, key: str, *, columns: Sequence[str], order_by: str, query: str) -> str:
        """Keep a view of the experiment's table of runs in MLflow, as its own "share" button does; returns where it opens.

        Args:
            columns: as MLflow names them, "params.`a.b`" and "metrics.`c`".
            query: which runs are shown.
        """
        state = {
            **{"searchFilter": query, "orderByKey": order_by, "orderByAsc": False, "startTime": "ALL"},
            **{"lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"},
            **{"selectedColumns": list(columns), "runsExpanded": {self.open(): True}},
        }
        self._client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(state))
        return f"#/experiments/{self.experiment_id}/runs?viewStateShareKey={key}"

    def children(self) -> list[Any]:
        """The runs that have this one as their parent."""
        query = f"tags.`mlflow.parentRunId` = '{self.open()}'"
        return list(self._client.search_runs([self.experiment_id], query, max_results=5000))

    def end_children(self, *, known: Sequence[str]) -> None:
        """Mark children that are still running as KILLED, unless their name is `known`."""
        for child in self.children():
            if child.info.status == "RUNNING" and child.info.run_name not in known:
                self._client.set_terminated(child.info.run_id, status="KILLED")

    def record_child(self, *, name: str, params: Mapping[str, str], tags: Mapping[str, str], status: str) -> None:
        """A child run that has nothing but this, unless there is one of this name already."""
        from mlflow.entities import Param

        if any(child.info.run_name == name for child in self.children()):
            return
        run = self._client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
        self._client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
        self._client.set_terminated(run.info.run_id, status=status)

    def close(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, status=status)

    def summary(self) -> tuple[str, dict[str, float]]:
        """The run's id and the newest value of every metric; the run is only looked at.

        Raises:
            TrackingError: the run is not there.
        """
        if self.run_id is None:
            self.connect()
        run = self._client.get_run(self.run_id) if self.run_id else self._find()
        if run is None:
            raise TrackingError(f"run {self._header.name} is not in {without_secrets(self._uri)}, where it was logged")
        return run.info.run_id, dict(run.data.metrics)


_LOCAL = arrow_fs.LocalFileSystem()
