"""One attempt at a run, as Ray Train takes it: what its controller, its policies and its workers are."""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.ray_support.private import TrainController
from orchestrator.ray_support.session import is_trial, on_cluster
from orchestrator.ray_support.spare_processes import WORKER_ENVIRONMENT
from orchestrator.training.attempts import Attempts
from orchestrator.training.journal_callback import JournalCallback
from orchestrator.training.policies import (
    ControllerPolicy,
    ControllerSpare,
    EmbeddedScaling,
    LiveNodesScaling,
    PreemptionThread,
)
from orchestrator.training.worker import train_worker
from workloads.config import to_dict

if TYPE_CHECKING:
    from orchestrator.training.session import Session


def make_trainer(session: "Session", attempts: Attempts) -> Any:
    """Ray Train's trainer of one attempt at the session's run."""
    api: Any = ray.train  # its annotations describe Train V1
    worker: Any = train_worker

    class Trainer(TorchTrainer):
        """Without the actors that have nothing to do here: each costs a process, which two cores feel."""

        def _create_default_callbacks(self) -> list[Any]:
            parent: Any = super()
            # Ray Data feeds no worker. And an embedded Ray ends with this process: nobody can lose its driver.
            unused = {"DatasetsCallback"} | (set() if on_cluster() else {"PlacementGroupCleanerCallback"})
            callbacks: list[Any] = parent._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unused]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["failure_policy"] = ControllerPolicy(self.run_config.failure_config, attempts)
            scaling_config: Any = self.scaling_config
            if session.experiment.scaling.is_elastic:
                parts["scaling_policy"] = LiveNodesScaling(scaling_config)
            elif not on_cluster():
                parts["scaling_policy"] = EmbeddedScaling(scaling_config)
            if is_trial():
                return _run_controller_here(parts)
            parent: Any = super()
            return parent._initialize_and_run_controller(**parts)

    run, scaling = session.run, session.experiment.scaling
    return Trainer(
        worker,
        train_loop_config=_job(session),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=scaling.num_workers,
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": float(scaling.cpus_per_worker), **({"GPU": 1.0} if scaling.use_gpu else {})},
            placement_strategy=scaling.placement,
        ),
        run_config=api.RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            storage_filesystem=run.filesystem,
            worker_runtime_env=WORKER_ENVIRONMENT,
            callbacks=[
                JournalCallback(str(session.journal)),
                *([PreemptionThread()] if on_cluster() else []),
                *([ControllerSpare()] if session.experiment.failure.spare_processes else []),
                *session.callbacks,
            ],
        ),
    )


def _run_controller_here(parts: Mapping[str, Any]) -> Any:
    """Ray Train's controller in this process, which is a trial's: an actor more would cost a start and its imports."""
    controller = TrainController(**parts)
    try:
        asyncio.run(controller.run())
    except SystemExit:  # Tune stops the trial; the process may serve the next one, so nothing may be left behind
        if controller._worker_group is not None:
            controller._worker_group.abort()
        raise
    return controller.get_result()


def _job(session: "Session") -> dict[str, Any]:
    """What a worker is told, in plain values."""
    return {
        "config": to_dict(session.experiment.science),
        "niceness": session.experiment.scaling.niceness,
        "threads": session.experiment.scaling.threads,
        "progress_key": session.run.claim,
        "storage": session.storage,
        "keep_checkpoints": session.experiment.storage.keep_checkpoints,
        "best_metric": session.experiment.storage.best_metric,
        "patience_s": session.experiment.failure.patience_s,
        "watch_preemption": on_cluster(),
        "spare": session.experiment.failure.spare_processes,
        "node_load": on_cluster() and session.experiment.tracking.system_metrics,
        "gauges_of": session.run.name if on_cluster() else None,
        "began": session.watch.began,
        "timings": session.watch.timings,
        "submitted": time.time(),
    }
