"""Fast paths of Ray Train: `PolicyTrainer` and its policies, which save processes and seconds at a start and after a fault.

All of them replace private parts of Ray Train (`ray_support.private`), and each can be taken out of `trainer.make_trainer` on
its own. Without them the driver continues a run after every fault, with a new controller.
"""

import asyncio
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from orchestrator.ray_support.private import (
    ElasticScalingPolicy,
    FailureDecision,
    FailurePolicy,
    FixedScalingPolicy,
    PreemptionCallback,
    PreemptionWatcher,
    TrainController,
    WorkerGroupCallback,
)
from orchestrator.ray_support.spare_processes import order_later
from orchestrator.training.attempts import Attempts

_AFTER_START_S = 15.0


class PolicyTrainer(TorchTrainer):
    """A `TorchTrainer` with policies of this project.

    Args:
        unused: class names of Ray Train's default callbacks to leave out: each costs a process.
        here: run the controller in this process instead of an actor; for a sweep's trial, which is an actor itself.
    """

    def __init__(
        self,
        *arguments: Any,
        failure_policy: FailurePolicy,
        scaling_policy: FixedScalingPolicy | ElasticScalingPolicy | None,
        unused: frozenset[str],
        here: bool,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._failure_policy, self._scaling_policy = failure_policy, scaling_policy
        self._unused, self._here = unused, here

    def _create_default_callbacks(self) -> list[Any]:
        parent: Any = super()
        callbacks: list[Any] = parent._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in self._unused]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = self._failure_policy
        if self._scaling_policy is not None:
            parts["scaling_policy"] = self._scaling_policy
        if self._here:
            return _run_controller_here(parts)
        parent: Any = super()
        return parent._initialize_and_run_controller(**parts)


def _run_controller_here(parts: Mapping[str, Any]) -> Any:
    controller = TrainController(**parts)
    try:
        asyncio.run(controller.run())
    except SystemExit:  # Tune stops the trial; the process may serve the next one, so nothing may be left behind
        if controller._worker_group is not None:
            controller._worker_group.abort()
        raise
    return controller.get_result()


class ControllerPolicy(FailurePolicy):
    """Continues a run inside the controller after a fault that may be retried at once, which saves a controller's start.

    The controller calls the same `Attempts.judge` as the driver, on the faults recorded in the run's journal, so both agree.
    """

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
    """Watches for preemption notices on a thread of the controller. Ray's own watcher is a process, started beside the
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
        self._watcher: Any = PreemptionWatcher(ranks, self._poll_interval_s, actors)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


class ControllerSpare(WorkerGroupCallback):
    """Orders a standby process for the actor by which a new group of workers wait for each other; the controller owns it."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Order it when the workers have had the cores for their own start."""
        order_later(_AFTER_START_S)


class EmbeddedScaling(FixedScalingPolicy):
    """Fixed worker count without autoscaler requests, for the local Ray, which cannot grow: saves the coordinator's process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no coordinator."""

    def _maybe_send_resource_request(self) -> None:
        pass


class LiveNodesScaling(ElasticScalingPolicy):
    """Elastic worker count over nodes that answer. Ray takes a dead node for dead after some 15 s, and its own count of what it
    may use is up to 20 s old; asking a dead node for a worker costs `start_timeout_s` and another controller on top."""

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        known = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in reserved]
        with ThreadPoolExecutor(max_workers=16) as pool:
            answers = pool.map(_answers, known)
            return {node["NodeID"]: reserved[node["NodeID"]] for node, ok in zip(known, answers, strict=True) if ok}


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether the node's raylet listens."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=2.0).close()
    except OSError:
        return False
    return True
