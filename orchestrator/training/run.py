"""Trains a run to its end (`train`): checks the request, connects to Ray, fits, records, and continues after faults."""

import contextlib
import logging
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.experiments.spec import AnyExperiment
from orchestrator.ray_support.errors import sentence, worker_cause
from orchestrator.ray_support.private import submission_id
from orchestrator.ray_support.session import is_trial, on_cluster, start_ray, uses_fast_paths
from orchestrator.ray_support.spare_processes import order_first
from orchestrator.runs.delivery import JournalDrain
from orchestrator.runs.identity import Run, claim_run, finished_run, hold_run, mark_finished, refuse_if_held
from orchestrator.runs.journal import Journal
from orchestrator.runs.journal_access import open_journal
from orchestrator.runs.records import TagsRecord
from orchestrator.tracking.addresses import (
    TrackingError,
    artifact_root,
    run_address,
    tracking_uri,
    without_secrets,
)
from orchestrator.tracking.client import quiet_mlflow
from orchestrator.tracking.header import DatasetUse, run_header
from orchestrator.tracking.sink import MlflowSink
from orchestrator.training import PRELOAD
from orchestrator.training.session import Session, Stopwatch, TrainingError, TrainOutcome
from workloads.errors import ConfigError, StoreUnavailableError

if TYPE_CHECKING:
    from ray.train import UserCallback

    from orchestrator.training.attempts import Attempts
    from orchestrator.training.stopping import StopRequest

logger = logging.getLogger(__name__)


def train(
    experiment: AnyExperiment,
    *,
    console: Console,
    watch: Stopwatch,
    debug: bool = False,
    tags: Mapping[str, str] | None = None,
    callbacks: "Sequence[UserCallback]" = (),
) -> TrainOutcome:
    """Run `experiment` to its end.

    Args:
        tags: of the tracked run, beside its own.
        callbacks: run in Ray Train's controller at every report.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        TrainingError: the run failed.
    """
    with watch.phase("preflight"):
        uri = tracking_uri(experiment)  # before the lock, for which an object store must answer
        refuse_if_held(experiment)
        datasets = check_request(experiment)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(hold_run(experiment))
        run = claim_run(experiment, manifest_sha256=datasets[0].sha256)
        journal = stack.enter_context(open_journal(experiment, run, lock=lock))
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
        session = Session(
            experiment=experiment,
            run=run,
            lock=lock,
            sink=sink,
            journal=journal,
            uri=uri,
            console=console,
            watch=watch,
            debug=debug,
            fast_paths=uses_fast_paths(experiment.scaling),
            callbacks=callbacks,
        )
        _connect(session)
        lock.on_lost(lambda: _abort(run.claim))
        try:
            return _fit_and_record(session)
        except BaseException:
            if lock.lost:
                lock.check()  # the reason for whatever was raised
            raise


def _connect(session: Session) -> None:
    """Start or join Ray, and beside that reach the tracking store, since importing MLflow and making its tables takes seconds."""
    pool = ThreadPoolExecutor(1)
    connected = pool.submit(session.sink.connect)
    pool.shutdown(wait=False)
    with session.watch.phase("ray"):
        start_ray(session.experiment, uri=session.uri, preload=PRELOAD, debug=session.debug)
        if session.fast_paths and not on_cluster() and not is_trial():
            order_first(session.experiment.scaling.most_workers)
    if is_trial():
        return  # its sweep has reached the store; an error comes again when the journal is delivered, and is retried there
    with session.watch.phase("tracking_wait"):
        _wait_connected(connected, session.uri)


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
    drain = JournalDrain(session.journal, sink, check=session.lock.check)
    drain.start()
    status, ended = "FAILED", False
    try:
        _fit_with_retries(session)
        ended = True
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit:  # Tune stops a trial that has trained enough; elsewhere it is a signal that came early
        status = "FINISHED" if is_trial() else "KILLED"
        raise
    finally:
        undelivered = drain.close(timeout_s=0.0 if session.lock.lost else 60.0)
        if not ended and sink.run_id is not None and not session.lock.lost:
            with contextlib.suppress(Exception):
                sink.close(status)
    try:
        session.lock.check()
    except StoreUnavailableError:
        with contextlib.suppress(Exception):
            sink.close("FAILED")  # the same command, given again, finishes it
        raise
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
    """Fit; continue from the newest checkpoint after transient failures, as `failures.decide` says, unless asked to end."""
    from orchestrator.training.progress import forget_stop
    from orchestrator.training.stopping import GraceOverError, stop_on_sigterm

    forget_stop(session.run.claim)
    grace_s = session.experiment.failure.grace_s
    try:
        with stop_on_sigterm(session.run.claim, grace_s=grace_s) as stop:
            _attempt_until_done(session, stop)
    except GraceOverError:
        raise TrainingError(
            f"run {session.run.name}: asked to end, and ended without waiting longer for its workers (failure.grace_s="
            f"{grace_s:g}); its newest checkpoint is of step {session.saved_step()}; give the same command again to continue"
        ) from None


def _attempt_until_done(session: Session, stop: "StopRequest") -> None:
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    attempts = session.attempts(uuid.uuid4().hex)
    while True:
        try:
            return _fit(session, attempts)
        except (TrainingFailedError, RayError) as error:
            if session.debug:
                logger.exception("an attempt failed")
            if session.lock.lost:
                raise
            failure, decision = attempts.judge(error)
            attempts.record(failure)
            if decision.action == "stop":
                if isinstance(worker_cause(error), ConfigError):
                    raise worker_cause(error) from error
                raise TrainingError(f"run {session.run.name}: {decision.reason}") from error
        if not stop.asked:
            when = f" in {decision.wait_s:.0f} s" if decision.wait_s >= 1 else ""
            session.console.print(
                f"{failure.kind} fault: {decision.reason}; continuing from the checkpoint of step {failure.saved_step}{when}",
                highlight=False,
                soft_wrap=True,
            )
            stop.wait(decision.wait_s)
        if stop.asked:
            raise TrainingError(
                f"run {session.run.name}: asked to end after a {failure.kind} fault ({failure.reason}); its newest checkpoint "
                f"is of step {failure.saved_step}; give the same command again to continue"
            )


def _fit(session: Session, attempts: "Attempts") -> None:
    with session.watch.phase("ray_train_imports"):
        from orchestrator.training.progress import ProgressWatcher
        from orchestrator.training.trainer import make_trainer

        trainer = make_trainer(session, attempts)
    try:
        with ProgressWatcher(session.run.claim, console=session.console):
            trainer.fit()
    except SystemExit:
        if is_trial():  # Tune stops a trial that has trained enough
            raise
        raise KeyboardInterrupt from None  # Ray's handler of Ctrl-C stops the workers and exits as if all were done


def _abort(claim: str) -> None:
    """End the fit of a run whose lock is lost: at once in a driver; in a trial, which is no main thread, after a checkpoint."""
    from orchestrator.training.progress import ask_to_stop

    if is_trial():
        ask_to_stop(claim)
    else:
        os.kill(os.getpid(), signal.SIGINT)  # Ray's handler of Ctrl-C stops the workers
