"""`orchestrator train`: check the request, start Ray, fit, keep the record, continue what failed in passing."""

import contextlib
import logging
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.ray_support.errors import sentence, worker_cause
from orchestrator.ray_support.private import submission_id
from orchestrator.ray_support.session import is_trial, on_cluster, start_ray
from orchestrator.ray_support.spare_processes import order_first
from orchestrator.runs.delivery import JournalDrain
from orchestrator.runs.identity import Run, claim_run, finished_run, hold_run, mark_finished
from orchestrator.runs.journal import Journal
from orchestrator.runs.journal_access import open_journal
from orchestrator.runs.records import TagsRecord
from orchestrator.tracking.addresses import (
    TrackingError,
    artifact_root,
    quiet_mlflow,
    run_address,
    tracking_uri,
    without_secrets,
)
from orchestrator.tracking.header import DatasetUse, run_header
from orchestrator.tracking.sink import MlflowSink
from orchestrator.training.session import Session, Stopwatch, TrainingError, TrainOutcome
from workloads.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.training.attempts import Attempts

logger = logging.getLogger(__name__)


def train(
    experiment: AnyExperiment,
    *,
    console: Any,
    watch: Stopwatch,
    debug: bool = False,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainOutcome:
    """Run `experiment` to its end.

    Args:
        tags: of the tracked run, beside its own.
        callbacks: Ray Train's, called in the controller at every report.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        TrainingError: the run failed.
    """
    with watch.phase("preflight"):
        datasets = check_request(experiment)
        uri = tracking_uri(experiment)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_run(experiment))
        run = claim_run(experiment, manifest_sha256=datasets[0].sha256)
        journal = stack.enter_context(open_journal(experiment, run))
        quiet_mlflow()
        sink = MlflowSink(
            run_header(experiment, run, datasets=datasets, tags=tags or {}),
            uri=uri,
            artifact_root=artifact_root(experiment),
            filesystem=run.filesystem,
            run_folder=run.folder,
            system_metrics=experiment.tracking.system_metrics,
        )
        if finished_run(run):
            console.print(f"run {run.name} has ended before; nothing is left to do", highlight=False)
            return _outcome(run, sink, uri)
        with ThreadPoolExecutor(1) as pool:
            # Importing MLflow and making its tables takes seconds: beside Ray's start.
            connected = pool.submit(sink.connect)
            with watch.phase("ray"):
                start_ray(experiment, uri=uri, debug=debug)
                if not on_cluster() and not is_trial():
                    order_first(experiment.scaling.most_workers)
            if not is_trial():  # its sweep has reached the store, and its workers need not wait
                with watch.phase("tracking_wait"):
                    _wait_connected(connected, uri)
        return _fit_and_record(
            Session(
                experiment=experiment,
                run=run,
                sink=sink,
                journal=journal,
                uri=uri,
                console=console,
                watch=watch,
                debug=debug,
                callbacks=callbacks,
            )
        )


def _wait_connected(connected: "Future[str]", uri: str) -> None:
    try:
        connected.result()
    except TrackingError as error:
        raise TrainingError(str(error)) from error
    except Exception as error:
        raise TrainingError(f"tracking.uri: {without_secrets(uri)} does not answer: {sentence(error)}") from error


def check_request(experiment: AnyExperiment) -> list[DatasetUse]:
    """Check everything that can be known before anything starts; returns the datasets, that of the training first."""
    from workloads.loops.dispatch import preflight

    check = preflight(experiment.science, experiment.scaling.most_workers)
    datasets = [DatasetUse(context="training", uri=experiment.data.uri, sha256=check.manifest_sha256)]
    if experiment.evaluation.uri and (digest := check.evaluation_manifest_sha256):
        datasets.append(DatasetUse(context="evaluation", uri=experiment.evaluation.uri, sha256=digest))
    return datasets


def _fit_and_record(session: Session) -> TrainOutcome:
    import ray

    sink, experiment = session.sink, session.experiment
    tags = {"ray.job_id": ray.get_runtime_context().get_job_id(), **_submission()}
    Journal(session.journal).append(TagsRecord(tags=tags, time_ms=int(1000 * session.watch.began)))
    drain = JournalDrain(session.journal, sink)
    drain.start()
    status, ended = "FAILED", False
    try:
        _fit_with_retries(session)
        ended = True
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit:  # a sweep has seen enough of this trial, and says so in its record
        status = "FINISHED"
        raise
    finally:
        undelivered = drain.close()
        if not ended and sink.run_id is not None:
            with contextlib.suppress(Exception):
                sink.close(status)
    if undelivered:
        raise TrainingError(
            f"run {session.run.name} is trained, but {without_secrets(session.uri)} did not take {undelivered} records "
            f"of it ({drain.last_error}); give the same command again to deliver them"
        )
    if experiment.tracking.log_model:
        step, place = session.best_checkpoint()
        sink.log_model(place, step=step)
    sink.close("FINISHED")
    mark_finished(session.run, sink.open())
    return _outcome(session.run, sink, session.uri)


def _submission() -> dict[str, str]:
    submitted = submission_id()
    return {"ray.submission_id": submitted} if submitted else {}


def _outcome(run: Run, sink: MlflowSink, uri: str) -> TrainOutcome:
    run_id, metrics = sink.summary()
    address = run_address(uri, sink.experiment_id or "0", run_id)
    return TrainOutcome(run=run, run_id=run_id, address=address, metrics=metrics)


def _fit_with_retries(session: Session) -> None:
    """Fit; what failed in passing is continued by name from its newest checkpoint, as `failures.decide` says."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    attempts = session.attempts(uuid.uuid4().hex)
    while True:
        try:
            return _fit(session, attempts)
        except (TrainingFailedError, RayError) as error:
            if session.debug:
                logger.exception("an attempt failed")
            failure, decision = attempts.judge(error)
            attempts.record(failure)
            if decision.action == "stop":
                if isinstance(worker_cause(error), ConfigError):
                    raise worker_cause(error) from error
                raise TrainingError(f"run {session.run.name}: {decision.reason}") from error
            when = f" in {decision.wait_s:.0f} s" if decision.wait_s >= 1 else ""
            session.console.print(
                f"{failure.kind} fault: {decision.reason}; continuing from the checkpoint of step {failure.saved_step}{when}",
                highlight=False,
                soft_wrap=True,
            )
            time.sleep(decision.wait_s)


def _fit(session: Session, attempts: "Attempts") -> None:
    with session.watch.phase("ray_train_imports"):
        from orchestrator.training.progress import ProgressWatcher, forget_stop
        from orchestrator.training.trainer import make_trainer

        trainer = make_trainer(session, attempts)
    forget_stop(session.run.claim)
    with ProgressWatcher(session.run.claim, console=session.console), _sigterm_stops(session.run.claim):
        try:
            trainer.fit()
        except SystemExit:  # Ray's handler of Ctrl-C stops the workers and would end this process as if all were done
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def _sigterm_stops(claim: str) -> Iterator[None]:
    """While the context lasts, SIGTERM asks the workers to save and end, which ends the run in words."""
    from orchestrator.training.progress import ask_to_stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: object) -> None:
        threading.Thread(target=ask_to_stop, args=(claim,), daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
