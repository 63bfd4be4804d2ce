"""Classifies the failure of an attempt at a run (`classify`) and decides what to do about it (`decide`), without acting."""

from dataclasses import dataclass
from typing import Literal

from orchestrator.ray_support.errors import died_at_birth, sentence, worker_cause
from orchestrator.ray_support.private import is_hang, is_startup_timeout
from workloads.errors import ConfigError

Kind = Literal["request", "deterministic", "stopped", "store", "node", "worker", "resources", "controller", "unknown"]
"""Kinds of failures.

`request`: invalid config. `deterministic`: would fail again. `stopped`: asked to stop. `store`: the object store is unavailable.
`node`: a node died with its workers. `worker`: a worker process died or hangs. `resources`: workers did not get their resources
in time. `controller`: Ray's control processes died. `unknown`: anything else.
"""

# Ray describes a death in many lines about its internals.
_DEATHS: dict[Kind, str] = {
    "worker": "a worker process died (killed, out of memory, or crashed)",
    "node": "a node died, and a worker with it",
    "controller": "the process that controls the workers died",
}

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed attempt."""

    kind: Kind
    reason: str  # one sentence
    signature: str  # equal for equal faults
    step: int | None  # updates done when it failed, if a worker raised
    saved_step: int  # the newest checkpoint's step afterwards; 0 without one
    at_s: float  # monotonic clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to try again, after which wait, and why."""

    action: Literal["retry", "stop"]
    wait_s: float
    reason: str


def decide(failure: Failure, earlier: list[Failure], *, retries: int, patience_s: float) -> Decision:
    """Retry or stop.

    A transient failure is retried with growing waits. What counts are failures since the last progress (a newer
    checkpoint): at most `retries` of them, and, while the store or the cluster is away, at most `patience_s` seconds.

    Args:
        earlier: this run's earlier failures, oldest first.
    """
    match failure.kind:
        case "request" | "deterministic" | "stopped":
            return Decision(action="stop", wait_s=0.0, reason=failure.reason)
    twin = next((f for f in earlier if f.signature == failure.signature and f.step == failure.step), None)
    if failure.kind == "unknown" and failure.step is not None and twin is not None:
        reason = f"{failure.reason}: the same at step {failure.step} twice, so it would happen again"
        return Decision(action="stop", wait_s=0.0, reason=reason)
    fruitless = [f for f in earlier if f.saved_step >= failure.saved_step]
    waits_for_others = failure.kind in ("store", "resources", "controller", "node")
    began = fruitless[0].at_s if fruitless else failure.at_s
    if waits_for_others and failure.at_s - began > patience_s:
        reason = f"{failure.reason}; not over after {failure.at_s - began:.0f} s (patience_s={patience_s:g})"
        return Decision(action="stop", wait_s=0.0, reason=reason)
    if not waits_for_others and len(fruitless) >= retries:
        reason = f"{failure.reason}; {len(fruitless) + 1} attempts without progress (retries={retries})"
        return Decision(action="stop", wait_s=0.0, reason=reason)
    if not waits_for_others or failure.kind == "node":
        wait_s = 0.0 if not fruitless else min(_FIRST_WAIT_S * 2 ** (len(fruitless) - 1), _LONGEST_WAIT_S)
    else:
        wait_s = min(_FIRST_WAIT_S * 2 ** len(fruitless), _LONGEST_WAIT_S)
    return Decision(action="retry", wait_s=wait_s, reason=failure.reason)


def classify(error: BaseException, *, saved_step: int, at_s: float) -> Failure:
    """Find the cause of a failed attempt inside Ray's wrappers, and its kind."""
    from ray.exceptions import RayError

    cause = worker_cause(error)
    kind = _kind(cause, error)
    reason = sentence(cause)
    if kind in _DEATHS and isinstance(cause, RayError):
        reason = f"{_DEATHS[kind]} ({reason})" if died_at_birth(cause) else _DEATHS[kind]
    step = getattr(cause, "at_step", None)
    return Failure(
        kind=kind,
        reason=reason,
        signature=f"{type(cause).__name__}: {reason}",
        step=step if isinstance(step, int) else None,
        saved_step=saved_step,
        at_s=at_s,
    )


def _kind(cause: BaseException, error: BaseException) -> Kind:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayError, WorkerCrashedError
    from ray.train import ControllerError, PreemptionError

    from workloads.errors import DataError, RunStoppedError, StoreUnavailableError
    from workloads.loops.meter import NonFiniteLossError
    from workloads.storage.checkpoint import CheckpointError
    from workloads.storage.filesystems import is_outage

    text = str(cause)
    match cause:
        case RunStoppedError():
            return "stopped"
        case StoreUnavailableError():
            return "store"
        case ConfigError():
            return "request"
        case DataError() | CheckpointError() | NonFiniteLossError():
            return "deterministic"
        case NodeDiedError():
            return "node"
        case ActorDiedError() | ActorUnavailableError() | WorkerCrashedError():
            if isinstance(error, RayError):  # nobody wrapped it: it is the controller that died
                return "controller"
            return "node" if "node has died" in text or "node was" in text else "worker"
        case PreemptionError():  # a node was taken, after notice
            return "node"
    if is_startup_timeout(cause) or ("timed out" in text.lower() and "placement group" in text.lower()):
        return "resources"
    if is_outage(cause):
        return "store"
    if is_hang(cause):
        return "worker"
    return "controller" if isinstance(error, (ControllerError, RayError)) else "unknown"
