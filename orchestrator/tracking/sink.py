"""The run's record in MLflow. Only the driver writes it, from one thread, out of the journal."""

import json
import logging
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs

from orchestrator.experiments.spec import AnyExperiment, SweepExperiment, command_of
from orchestrator.runs.identity import Run
from orchestrator.runs.journal import Record
from workloads.config import ConfigError, flatten, to_yaml

logger = logging.getLogger(__name__)

CLAIM_TAG = "run.claim"
_LARGEST_BATCH = 1000  # MLflow's limit of metrics in one call
_LONGEST_PARAM = 6000  # characters
_MUST_AGREE = ("train/loss", "eval/")  # timings differ between attempts, results must not
MUST_AGREE_TOLERANCE = 1e-3  # relative above 1: other thread counts add in another order


class TrackingError(RuntimeError):
    """The tracking server does not do what the run needs of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """What is known of a run before its first step."""

    name: str
    claim: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Sequence[tuple[str, str, str, str]]  # context (training, evaluation), name, digest, kind of source
    config_yaml: str


def tracking_uri(experiment: AnyExperiment) -> str:
    """The configured tracking URI, else MLFLOW_TRACKING_URI, else SQLite in the (local) output folder.

    Raises:
        ConfigError: the output folder is not local and no tracking URI is given.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "://" in experiment.storage.path:
        raise ConfigError(
            f"tracking.uri: needed, because storage.path {experiment.storage.path} cannot hold an SQLite file; "
            "set it or MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{experiment.storage.path}/mlflow.db"


def artifact_root(experiment: AnyExperiment) -> str | None:
    """Where artifacts go when the tracking store is a local SQLite file; a server decides for itself."""
    is_local = tracking_uri(experiment).startswith("sqlite:") and "://" not in experiment.storage.path
    return Path(experiment.storage.path, "mlartifacts").as_uri() if is_local else None


def run_header(
    experiment: AnyExperiment, run: Run, *, manifests: Mapping[str, tuple[str, str]], tags: Mapping[str, str]
) -> RunHeader:
    """Parameters, tags, dataset inputs and config of `run`.

    Args:
        manifests: context (`training`, `evaluation`) → (data URI, manifest SHA-256).
        tags: more tags.
    """
    science = flatten(experiment.science)
    scaling = {f"scaling.{key}": value for key, value in flatten(experiment.scaling).items()}
    tags = {
        CLAIM_TAG: run.claim,
        "config.sha256": run.config_sha256,
        "data.manifest_sha256": run.manifest_sha256,
        **tags,
        "run.loop": experiment.loop,
        "mlflow.source.name": f"orchestrator {command_of(experiment)} {experiment.name}",
        "mlflow.source.type": "JOB",
        **git_tags(),
    }
    return RunHeader(
        name=run.name,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        params={key: _presentable(value)[:_LONGEST_PARAM] for key, value in {**science, **scaling}.items()},
        tags=tags,
        datasets=[
            (context, dataset_label(uri), digest[:36], "s3" if uri.startswith("s3://") else "local")
            for context, (uri, digest) in manifests.items()
        ],
        config_yaml=without_secrets(to_yaml(experiment)),
    )


def sweep_header(experiment: SweepExperiment, run: Run) -> RunHeader:
    """Parameters, tags and config of a sweep's parent run."""
    values = {**flatten(experiment.science), **{f"sweep.{key}": v for key, v in flatten(experiment.sweep).items()}}
    return RunHeader(
        name=run.name,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        params={key: _presentable(value)[:_LONGEST_PARAM] for key, value in values.items()},
        tags={
            CLAIM_TAG: run.claim,
            "config.sha256": run.config_sha256,
            "data.manifest_sha256": run.manifest_sha256,
            "sweep.name": run.name,
            "sweep.stage": "sweep",
            "mlflow.source.name": f"orchestrator sweep {experiment.name}",
            "mlflow.source.type": "JOB",
            **git_tags(),
        },
        datasets=[],
        config_yaml=without_secrets(to_yaml(experiment)),
    )


def shown_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as a run shows them: no machine paths, no credentials, no text longer than MLflow takes."""
    return {key: _presentable(value)[:_LONGEST_PARAM] for key, value in values.items()}


def _presentable(value: Any) -> str:
    """A parameter's text: a local path is only its last part, an address loses its credentials."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if value.startswith(("/", "file://")) else without_secrets(value)
    return json.dumps(value)  # as it would be given on the command line


def without_secrets(text: str) -> str:
    """`text` with the credentials taken out of its addresses."""
    return re.sub(r"://[^/@\s'\"]+@", "://", text)


def dataset_label(uri: str) -> str:
    """A short name for a dataset: the last part of its URI."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", uri.rstrip("/").rpartition("/")[2]) or "data"


def git_tags() -> dict[str, str]:
    """The commit that the code was checked out from, if it was."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tags = {"mlflow.source.git.commit": git("rev-parse", "HEAD")}
        return tags | ({"git.uncommitted_changes": "true"} if git("status", "--porcelain", "-uno") else {})
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("ORCHESTRATOR_GIT_COMMIT")  # for a job whose working directory came without .git
        return {"mlflow.source.git.commit": commit} if commit else {}


def quiet_mlflow() -> None:
    """No telemetry; a dead server is reported after seconds, not minutes, because the journal does the retrying."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)


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


def page_address(uri: str, page: str) -> str:
    """Where people open a page of MLflow: on its server, or on the one that the command starts for a local store."""
    if is_server(uri):
        return f"{without_secrets(uri).rstrip('/')}/{page}"
    return f"{_local_server(uri)}   then http://127.0.0.1:5000/{page}"


def run_address(uri: str, experiment_id: str, run_id: str) -> str:
    """Where people look at the run: a server's page, or the command that opens a local store."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    return page_address(uri, page) if is_server(uri) else _local_server(uri)


def is_server(uri: str) -> bool:
    """Whether a tracking store is reached through a server of MLflow."""
    return uri.startswith(("http://", "https://"))


def _local_server(uri: str) -> str:
    return f"mlflow ui --backend-store-uri {uri}"
