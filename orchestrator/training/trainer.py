"""Builds the trainer for one attempt at a run: Ray Train's `TorchTrainer`, or `PolicyTrainer` where fast paths are used."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.ray_support.session import is_trial, on_cluster
from orchestrator.ray_support.spare_processes import WORKER_ENVIRONMENT
from orchestrator.training.attempts import Attempts
from orchestrator.training.journal_callback import JournalCallback
from orchestrator.training.worker import WorkerJob, train_worker
from workloads.config import to_dict

if TYPE_CHECKING:
    from orchestrator.training.session import Session

_TRAIN: Any = ray.train  # its annotations describe Train V1


def make_trainer(session: "Session", attempts: Attempts) -> TorchTrainer:
    """The trainer of one attempt at the session's run."""
    scaling = session.experiment.scaling
    options: dict[str, Any] = {
        "train_loop_config": {"job": _job(session)},
        "torch_config": TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        "scaling_config": _TRAIN.ScalingConfig(
            num_workers=scaling.num_workers,
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": float(scaling.cpus_per_worker), **({"GPU": 1.0} if scaling.use_gpu else {})},
            placement_strategy=scaling.placement,
        ),
    }
    where: dict[str, Any] = {
        "name": session.run.name,
        "storage_path": session.run.storage_path,
        "storage_filesystem": session.run.filesystem,
    }
    callbacks = [JournalCallback(str(session.journal)), *session.callbacks]
    if session.fast_paths:
        return _fast_trainer(session, attempts, options, where, callbacks)
    # A failed attempt comes back to the driver, which judges it, records it and makes the next one.
    once = _TRAIN.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
    worker: Any = train_worker
    config = _TRAIN.RunConfig(**where, callbacks=callbacks, failure_config=once)
    return TorchTrainer(worker, run_config=config, **options)


def _fast_trainer(
    session: "Session",
    attempts: Attempts,
    options: Mapping[str, Any],
    where: Mapping[str, Any],
    callbacks: Sequence[ray.train.UserCallback],
) -> TorchTrainer:
    """`make_trainer` with every fast path; each line can be taken out on its own."""
    from orchestrator.training import policies

    experiment, scaling_config = session.experiment, options["scaling_config"]
    added: list[Any] = []
    if on_cluster():
        added.append(policies.PreemptionThread())
    if experiment.failure.spare_processes:
        added.append(policies.ControllerSpare())
    config = _TRAIN.RunConfig(**where, callbacks=[*callbacks, *added], worker_runtime_env=WORKER_ENVIRONMENT)
    fixed = None if on_cluster() else policies.EmbeddedScaling(scaling_config)
    # Ray Data feeds no worker; a local Ray ends with this process, so nobody can lose its driver.
    unused = {"DatasetsCallback"} if on_cluster() else {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    return policies.PolicyTrainer(
        train_worker,
        run_config=config,
        **options,
        failure_policy=policies.ControllerPolicy(config.failure_config, attempts),
        scaling_policy=policies.LiveNodesScaling(scaling_config) if experiment.scaling.is_elastic else fixed,
        unused=frozenset(unused),
        here=is_trial(),
    )


def _job(session: "Session") -> WorkerJob:
    experiment = session.experiment
    return WorkerJob(
        config=to_dict(experiment.science),
        storage=session.storage,
        keep_checkpoints=experiment.storage.keep_checkpoints,
        best_metric=experiment.storage.best_metric,
        patience_s=experiment.failure.patience_s,
        niceness=experiment.scaling.niceness,
        threads=experiment.scaling.threads,
        progress_key=session.run.claim,
        watch_preemption=on_cluster(),
        standby=session.fast_paths and experiment.failure.spare_processes,
        node_load=on_cluster() and experiment.tracking.system_metrics,
        gauges_of=session.run.name if on_cluster() else None,
        began=session.watch.began,
        timings=dict(session.watch.timings),
        submitted=time.time(),
    )
