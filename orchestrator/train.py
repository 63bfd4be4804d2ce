"""`orchestrator train`: check the request, start Ray, fit, keep the record, continue what failed in passing."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.journal import Journal, JournalDrain
from orchestrator.runs import Run, claim_run, finished_run, mark_finished
from orchestrator.spec import TrainExperiment
from orchestrator.track import (
    MlflowSink,
    TrackingError,
    artifact_root,
    quiet_mlflow,
    run_address,
    run_header,
    tracking_uri,
    without_secrets,
)
from workloads.config import ConfigError, to_dict

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run failed; the message says why in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """A finished run."""

    run: Run
    run_id: str
    address: str
    metrics: Mapping[str, float]
    checkpoint: Path | None


class Stopwatch:
    """Seconds of each phase before the first step."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.timings: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.time()
        try:
            yield
        finally:
            self.timings[f"startup/{name}_s"] = time.time() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """What the phases of one `train` share."""

    experiment: TrainExperiment
    run: Run
    sink: MlflowSink
    journal: Path
    uri: str  # of the tracking store
    console: Any
    watch: Stopwatch
    debug: bool


def train(experiment: TrainExperiment, *, console: Any, watch: Stopwatch, debug: bool = False) -> TrainOutcome:
    """Run `experiment` to its end.

    Raises:
        ConfigError, DataError, PlanError: the request cannot work; nothing was started.
        TrainingError: the run failed.
    """
    with watch.phase("preflight"):
        manifests = check_request(experiment)
        uri = tracking_uri(experiment)
        run = claim_run(experiment)
    quiet_mlflow()
    sink = MlflowSink(
        run_header(experiment, run, manifests=manifests),
        uri=uri,
        artifact_root=artifact_root(experiment),
        filesystem=run.filesystem,
        run_folder=run.folder,
        system_metrics=experiment.tracking.system_metrics,
    )
    if finished_run(run):
        console.print(f"run {run.name} has ended before; nothing is left to do", highlight=False)
        return _outcome(run, sink, uri, checkpoint=None)
    with ThreadPoolExecutor(1) as pool:
        # Importing MLflow and making its tables takes seconds: beside Ray's start.
        connected = pool.submit(sink.connect)
        with watch.phase("ray"):
            start_ray(experiment, debug=debug)
        with watch.phase("tracking_wait"):
            _wait_connected(connected, uri)
    journal = journal_path(experiment, run)
    return _fit_and_record(
        _Session(
            experiment=experiment,
            run=run,
            sink=sink,
            journal=journal,
            uri=uri,
            console=console,
            watch=watch,
            debug=debug,
        )
    )


def _wait_connected(connected: "Future[None]", uri: str) -> None:
    try:
        connected.result()
    except TrackingError as error:
        raise TrainingError(str(error)) from error
    except Exception as error:
        raise TrainingError(f"tracking.uri: {without_secrets(uri)} does not answer: {one_line(error)}") from error


def check_request(experiment: TrainExperiment) -> dict[str, tuple[str, str]]:
    """Everything that can be known to fail before anything starts; returns context → (data URI, manifest SHA-256)."""
    from workloads.loops.pretrain import preflight

    check = preflight(experiment.science, experiment.scaling.num_workers)
    manifests = {"training": (experiment.data.uri, check.manifest_sha256)}
    if experiment.evaluation.uri and check.evaluation_manifest_sha256:
        manifests["evaluation"] = (experiment.evaluation.uri, check.evaluation_manifest_sha256)
    return manifests


def journal_path(experiment: TrainExperiment, run: Run) -> Path:
    """The run's journal, on this machine: in the output folder where that is local, else in the temporary folder."""
    local = "://" not in experiment.storage.path
    return (Path(run.folder) if local else Path(tempfile.gettempdir(), f"orchestrator-{run.claim}")) / "journal.jsonl"


def start_ray(experiment: TrainExperiment, *, debug: bool) -> None:
    """Join the cluster of RAY_ADDRESS (a submitted job has it set), else start one inside this process.

    Raises:
        ConfigError: the cluster is too small for what `scaling` asks.
    """
    scaling = experiment.scaling
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(scaling.poll_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(scaling.start_timeout_s),
        "RAY_worker_niceness": str(scaling.niceness),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    import ray

    if ray.is_initialized():
        os.environ.update(settings)
        return _check_resources(experiment)
    if not os.environ.get("RAY_ADDRESS"):
        settings |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    os.environ.update(settings)
    common: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
        "configure_logging": True,
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address=os.environ["RAY_ADDRESS"], **common)
        return _check_resources(experiment)
    # Logical CPUs: a machine with fewer still runs, slower. Nothing else of Ray is needed inside one process.
    wanted = scaling.num_workers * scaling.cpus_per_worker
    ray.init(address="local", num_cpus=max(wanted, os.cpu_count() or 1), include_dashboard=False, **common)
    return _check_resources(experiment)


def _check_resources(experiment: TrainExperiment) -> None:
    import ray

    scaling, have = experiment.scaling, ray.cluster_resources()
    needs = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        needs["GPU"] = scaling.num_workers
    for name, wanted in needs.items():
        if have.get(name, 0) < wanted:
            raise ConfigError(
                f"scaling.num_workers: {scaling.num_workers} workers need {wanted} {name}s together, "
                f"the cluster has {have.get(name, 0):g}; ask for fewer workers or add nodes"
            )


def _fit_and_record(session: _Session) -> TrainOutcome:
    import ray

    sink, experiment = session.sink, session.experiment
    Journal(session.journal).append({"kind": "tags", "tags": {"ray.job_id": ray.get_runtime_context().get_job_id()}})
    drain = JournalDrain(session.journal, sink)
    drain.start()
    status = "FAILED"
    try:
        checkpoint, step = _fit_with_retries(session)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        undelivered = drain.close()
        if status != "FINISHED" and sink.run_id is not None:
            with contextlib.suppress(Exception):
                sink.close(status)
    if undelivered:
        raise TrainingError(
            f"run {session.run.name} is trained, but {without_secrets(session.uri)} did not take {undelivered} records "
            f"of it ({drain.last_error}); give the same command again to deliver them"
        )
    if experiment.tracking.log_model and checkpoint is not None:
        sink.log_model(checkpoint, step=step)
    sink.close("FINISHED")
    mark_finished(session.run, sink.open())
    return _outcome(session.run, sink, session.uri, checkpoint=checkpoint)


def _outcome(run: Run, sink: MlflowSink, uri: str, *, checkpoint: Path | None) -> TrainOutcome:
    run_id, metrics = sink.summary()
    address = run_address(uri, sink.experiment_id or "0", run_id)
    return TrainOutcome(run=run, run_id=run_id, address=address, metrics=metrics, checkpoint=checkpoint)


def _fit_with_retries(session: _Session) -> tuple[Path | None, int]:
    """Fit; a failure that may pass is continued by name from the last checkpoint, up to `retries` times."""
    from ray.train import TrainingFailedError

    attempts = session.experiment.retries + 1
    for attempt in range(1, attempts + 1):
        try:
            return _fit(session)
        except TrainingFailedError as error:
            if session.debug:
                logger.exception("attempt %d failed", attempt)
            cause = worker_cause(error)
            if is_permanent(cause):
                raise as_failure(cause) from error
            if attempt == attempts:
                last = f"{type(cause).__name__}: {one_line(cause)}"
                raise TrainingError(f"run {session.run.name} failed {attempt} times, at last with {last}") from error
            session.console.print(f"attempt {attempt} failed ({one_line(cause)}); continuing from the last checkpoint")
    raise AssertionError("unreachable")


def _fit(session: _Session) -> tuple[Path | None, int]:
    with session.watch.phase("ray_train_imports"):
        from orchestrator.progress import ProgressWatcher

        trainer = _trainer(session)
    with ProgressWatcher(session.run.claim, console=session.console):
        try:
            result = trainer.fit()
        except SystemExit:  # Ray's handler of Ctrl-C stops the workers and would end this process as if all were done
            raise KeyboardInterrupt from None
    if result.checkpoint is None:
        return None, 0
    local = "://" not in session.experiment.storage.path
    folder = Path(result.checkpoint.path if local else result.checkpoint.to_directory())
    return folder, int((result.metrics or {}).get("step", 0))


def _trainer(session: _Session) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.journal_callback import JournalCallback
    from orchestrator.ray_runtime import train_worker

    api: Any = ray.train  # its annotations describe Train V1
    worker: Any = train_worker

    class Trainer(TorchTrainer):
        """An embedded Ray ends with this process; the actor that cleans up after a lost driver would watch for nothing."""

        def _create_default_callbacks(self) -> list[Any]:
            parent: Any = super()
            callbacks: list[Any] = parent._create_default_callbacks()
            if os.environ.get("RAY_ADDRESS"):
                return callbacks
            return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    experiment, run, scaling = session.experiment, session.run, session.experiment.scaling
    return Trainer(
        worker,
        train_loop_config=_job(session),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": float(scaling.cpus_per_worker), **({"GPU": 1.0} if scaling.use_gpu else {})},
            placement_strategy=scaling.placement,
        ),
        run_config=api.RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            storage_filesystem=run.filesystem,
            # One place decides about retries, and it can tell a fault in the request from a lost machine: this module.
            failure_config=api.FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=api.CheckpointConfig(num_to_keep=experiment.storage.keep_checkpoints),
            callbacks=[JournalCallback(str(session.journal))],
            worker_runtime_env={"env_vars": worker_environment(experiment, session.uri)},
        ),
    )


def _job(session: _Session) -> dict[str, Any]:
    """What a worker is told, in plain values."""
    return {
        "config": to_dict(session.experiment.science),
        "niceness": session.experiment.scaling.niceness,
        "threads": session.experiment.scaling.threads,
        "progress_key": session.run.claim,
        "began": session.watch.began,
        "timings": session.watch.timings,
        "submitted": time.time(),
    }


def worker_environment(experiment: TrainExperiment, uri: str) -> dict[str, str]:
    """Variables that workers get on purpose; they share neither the driver's folder nor its environment."""
    passed = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return {
        "OMP_NUM_THREADS": str(experiment.scaling.threads),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **(passed if experiment_uses_s3(experiment) else {}),
    }


def experiment_uses_s3(experiment: TrainExperiment) -> bool:
    """Whether any of the experiment's data or output is in an object store."""
    uris = (experiment.storage.path, experiment.data.uri, experiment.evaluation.uri or "")
    return any(uri.startswith("s3://") for uri in uris)


def worker_cause(error: Exception) -> BaseException:
    """The exception that a worker raised, out of Ray's wrappers; `error` itself if no worker did."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    permanent = [cause for cause in causes if is_permanent(cause)]
    return (permanent or causes or [getattr(error, "controller_failure", error)])[0]


def is_permanent(cause: BaseException) -> bool:
    """Whether the same request would fail the same way again."""
    from workloads.checkpoint import CheckpointError

    return is_request_error(cause) or isinstance(cause, (CheckpointError, _non_finite()))


def is_request_error(cause: BaseException) -> bool:
    """Whether the request was wrong, rather than the run unlucky."""
    from workloads.data.manifest import DataError
    from workloads.data.sample_plan import PlanError

    return isinstance(cause, (ConfigError, DataError, PlanError))


def _non_finite() -> type[Exception]:
    from workloads.loops.pretrain import NonFiniteLossError

    return NonFiniteLossError


def as_failure(cause: BaseException) -> BaseException:
    """What to raise for a permanent `cause`: a wrong request stays itself, the rest is a failed run."""
    return cause if is_request_error(cause) else TrainingError(one_line(cause))


def one_line(error: BaseException) -> str:
    """An exception's message as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
