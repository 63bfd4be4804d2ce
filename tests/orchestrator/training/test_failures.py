"""What is done about which failure: pure decisions, and the naming of real exceptions."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError

from orchestrator.ray_support.errors import sentence, worker_cause
from orchestrator.training.failures import Decision, Failure, classify, decide
from workloads.errors import ConfigError, DataError, RunStoppedError, StoreUnavailableError
from workloads.loops.meter import NonFiniteLossError


def failure(kind: str, *, step: int | None = None, saved: int = 0, at_s: float = 0.0, reason: str = "broke") -> Failure:
    return Failure(kind=kind, reason=reason, signature=reason, step=step, saved_step=saved, at_s=at_s)  # type: ignore[arg-type]


def decided(last: Failure, *earlier: Failure, retries: int = 2, patience_s: float = 60.0) -> Decision:
    return decide(last, list(earlier), retries=retries, patience_s=patience_s)


@pytest.mark.parametrize("kind", ["request", "deterministic", "stopped"])
def test_what_would_fail_again_is_never_retried(kind):
    assert decided(failure(kind), retries=9).action == "stop"


def test_a_worker_is_retried_at_once_then_with_growing_waits_then_no_more():
    first = decided(failure("worker"))
    assert (first.action, first.wait_s) == ("retry", 0.0)
    second = decided(failure("worker"), failure("worker"))
    assert second.action == "retry" and second.wait_s > 0
    third = decided(failure("worker"), failure("worker"), failure("worker"))
    assert third.action == "stop" and "3 attempts without progress" in third.reason


def test_progress_gives_new_attempts():
    earlier = [failure("worker", saved=10), failure("worker", saved=20), failure("worker", saved=30)]
    assert decided(failure("worker", saved=40), *earlier).action == "retry"
    assert decided(failure("worker", saved=30), *earlier, failure("worker", saved=30)).action == "stop"


def test_the_same_error_at_the_same_step_twice_stops_at_once():
    assert decided(failure("unknown", step=7), failure("unknown", step=7), retries=9).action == "stop"
    assert decided(failure("unknown", step=8), failure("unknown", step=7), retries=9).action == "retry"
    assert (
        decided(failure("unknown", step=7, reason="a"), failure("unknown", step=7, reason="b"), retries=9).action
        == "retry"
    )
    assert (
        decided(failure("worker", step=7), failure("worker", step=7), retries=9).action == "retry"
    )  # it was killed twice


def test_a_store_that_is_away_is_waited_for_as_long_as_patience_lasts():
    earlier = [failure("store", at_s=t) for t in (0.0, 10.0, 30.0, 50.0)]
    assert decided(failure("store", at_s=59.0), *earlier, retries=0).action == "retry"
    late = decided(failure("store", at_s=61.0), *earlier, retries=9)
    assert late.action == "stop" and "patience_s=60" in late.reason
    waits = [decided(failure("store"), *[failure("store")] * n, patience_s=1e9).wait_s for n in range(8)]
    assert waits == sorted(waits) and waits[0] >= 1 and waits[-1] == 30


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (RunStoppedError("stopped"), "stopped"),
        (StoreUnavailableError("s3://b/k: HTTP status 503"), "store"),
        (DataError("shard-000001.parquet: 10 bytes, the manifest says 20"), "deterministic"),
        (NonFiniteLossError("the loss is nan"), "deterministic"),
        (ConfigError("steps: no"), "request"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7, Couldn't connect to server"), "store"),
        (WorkerCrashedError(), "worker"),
        (ValueError("index 3 is out of bounds"), "unknown"),
        (WorkerGroupStartupTimeoutError(2), "resources"),
        (WorkerHealthCheckTimeoutError("worker 0 did not answer"), "worker"),
    ],
)
def test_what_a_worker_raised_is_named(cause, kind):
    found = classify(WorkerGroupError("failed", {0: cause}), saved_step=5, at_s=1.0)
    assert found.kind == kind and found.saved_step == 5 and "\n" not in found.reason


def test_the_controller_that_dies_is_told_from_a_worker_that_does():
    assert classify(ActorDiedError(), saved_step=0, at_s=0.0).kind == "controller"
    assert classify(WorkerGroupError("failed", {1: ActorDiedError()}), saved_step=0, at_s=0.0).kind == "worker"


def test_a_node_that_was_taken_after_notice_is_a_node() -> None:
    from ray.train import PreemptionError

    error = PreemptionError.__new__(PreemptionError)
    Exception.__init__(error, "Training was interrupted by node preemption")
    assert classify(error, saved_step=0, at_s=0.0).kind == "node"


def test_of_several_workers_the_one_at_fault_is_named():
    causes = {0: RuntimeError("Connection closed by peer"), 1: NonFiniteLossError("the loss is nan")}
    assert isinstance(worker_cause(WorkerGroupError("failed", causes)), NonFiniteLossError)
    died = {0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}
    assert isinstance(worker_cause(WorkerGroupError("failed", died)), ActorDiedError)


def test_the_step_of_a_failure_travels_with_the_exception():
    error = ValueError("index 3 is out of bounds")
    error.at_step = 12  # type: ignore[attr-defined]
    back = pickle.loads(pickle.dumps(error))
    assert classify(WorkerGroupError("failed", {0: back}), saved_step=0, at_s=0.0).step == 12


def test_a_controller_that_could_not_begin_says_why() -> None:
    cause = RayTaskError("TrainController.__init__", "Traceback\nOSError: bucket 'x': HTTP status 412", OSError("412"))
    found = classify(ActorDiedError(cause), saved_step=0, at_s=0.0)
    assert found.kind == "controller"
    assert found.reason == "the process that controls the workers died (OSError: bucket 'x': HTTP status 412)"


CUDA = """CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
SQL = """(sqlite3.OperationalError) database is locked
[SQL: UPDATE runs SET status=? WHERE runs.run_uuid = ?]
(Background on this error at: https://sqlalche.me/e/20/e3q8)"""
TRACEBACK = """Task failed:
Traceback (most recent call last):
  File "x.py", line 3, in f
ValueError: index 3 is out of bounds"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (CUDA, "CUDA error: an illegal memory access was encountered"),
        (SQL, "(sqlite3.OperationalError) database is locked"),
        (TRACEBACK, "ValueError: index 3 is out of bounds"),
        ("", "RuntimeError"),
    ],
)
def test_the_line_that_names_the_error_is_taken_not_the_advice_after_it(text: str, line: str) -> None:
    assert sentence(RuntimeError(text)) == line


def test_unlike_cuda_errors_are_told_apart() -> None:
    other = CUDA.replace("an illegal memory access was encountered", "device-side assert triggered")
    first, second = (
        classify(WorkerGroupError("failed", {0: RuntimeError(text)}), saved_step=0, at_s=0.0) for text in (CUDA, other)
    )
    assert first.signature != second.signature
