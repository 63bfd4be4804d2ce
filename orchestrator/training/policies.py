"""How a run goes on after a fault: `failures` decides, this acts, in Ray Train's controller where that is quicker.

The controller continues a run whose worker died without a new controller, which saves its start. It knows only errors,
so it takes its word from the same decisions as the driver, over the same history: the faults in the run's journal.
"""

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from orchestrator.ray_support.private import (
    ElasticScalingPolicy,
    FailureDecision,
    FailurePolicy,
    FixedScalingPolicy,
    PreemptionCallback,
    PreemptionWatcher,
    WorkerGroupCallback,
)
from orchestrator.ray_support.spare_processes import order_later
from orchestrator.training.attempts import Attempts

_AFTER_START_S = 15.0


class ControllerPolicy(FailurePolicy):
    """Inside the controller: continue at once what may be continued at once; leave waiting and stopping to the driver."""

    def __init__(self, failure_config: Any, attempts: Attempts) -> None:
        super().__init__(failure_config)
        self._attempts = attempts

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Retry, or raise to the driver, which judges again and records."""
        failure, decision = self._attempts.judge(training_failed_error)
        if decision.action == "stop" or decision.wait_s > 0:
            return FailureDecision.RAISE
        self._attempts.record(failure)
        return FailureDecision.RETRY


class PreemptionThread(PreemptionCallback):
    """Looks for nodes about to be taken on a thread of the controller: Ray's own takes a process, started beside the
    workers after every fault, just when they need the cores."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of the new workers."""
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        actors: dict[int, Any] = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        watcher = PreemptionWatcher(ranks, self._poll_interval_s, actors)
        self._watcher: Any = watcher

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


class ControllerSpare(WorkerGroupCallback):
    """A spare for the actor by which a new group of workers wait for each other; it is the controller's own."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Order it when the workers have had the cores for their own start."""
        order_later(_AFTER_START_S)


class EmbeddedScaling(FixedScalingPolicy):
    """A fixed number of workers on a Ray that cannot grow: asks no autoscaler, whose coordinator would be one more process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nobody is asked for resources."""

    def _maybe_send_resource_request(self) -> None:
        pass


class LiveNodesScaling(ElasticScalingPolicy):
    """Counts only nodes that answer. Ray takes a dead node for dead after some 15 s, and its own count of what it may use
    is up to 20 s old; asking a dead node for a worker costs `start_timeout_s` and another controller on top."""

    def _get_reserved_resources(self) -> Any:
        parent: Any = super()
        reserved = parent._get_reserved_resources()
        if reserved is None:
            return None
        known = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in reserved]
        with ThreadPoolExecutor(max_workers=16) as pool:
            answers = pool.map(_answers, known)
            return {node["NodeID"]: reserved[node["NodeID"]] for node, ok in zip(known, answers, strict=True) if ok}


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether somebody listens where the node's raylet should."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=2.0).close()
    except OSError:
        return False
    return True
