"""Ray for one command: the cluster that it is told of, or one inside its own process; and what Ray's processes get of its environment."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.experiments.spec import AnyExperiment, places_read
from orchestrator.ray_support import credentials
from orchestrator.ray_support.spare_processes import importing
from workloads.errors import ConfigError

RESUBMITTED = "ORCHESTRATOR_RESUBMITTED"
"""Variable of a job that was submitted again after the first was lost, perhaps to a new head whose nodes have yet to join."""
_JOIN_S = 120.0


def on_cluster() -> bool:
    """Whether this process joins a cluster (a submitted job has RAY_ADDRESS set) rather than starting a Ray of its own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def is_trial() -> bool:
    """Whether this process is a sweep's trial, an actor, rather than a driver."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def start_ray(experiment: AnyExperiment, *, uri: str, debug: bool, trials: int = 1) -> None:
    """Join the cluster of RAY_ADDRESS, else start one inside this process; does nothing if this process has joined one.

    Args:
        uri: of the tracking store.
        trials: of a sweep, at the same time; a Ray of our own is made for so many.

    Raises:
        ConfigError: the cluster is too small for what `scaling` asks.
    """
    scaling = experiment.scaling
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(scaling.poll_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(scaling.start_timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(scaling.hang_timeout_s),
        "RAY_worker_niceness": str(scaling.niceness),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process; `PreemptionThread` does its work
    }
    import ray

    if ray.is_initialized():
        os.environ.update(settings)
        return check_resources(experiment)
    if not on_cluster():
        settings |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            **importing(),
            **job_environment(experiment, uri),
        }
    os.environ.update(settings)
    common: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
        "configure_logging": True,
    }
    if on_cluster():
        # For the whole job, since Ray's controller reads the run's storage as the workers do. A submitted job has an
        # environment of its own, where this process got the same values from: what is given here wins.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        join(os.environ["RAY_ADDRESS"], job_environment(experiment, uri), **common)
        return check_resources(experiment)
    # Logical CPUs: a machine with fewer still runs, slower. Nothing else of Ray is needed inside one process.
    wanted = trials * scaling.most_workers * scaling.cpus_per_worker
    ray.init(address="local", num_cpus=max(wanted, os.cpu_count() or 1), include_dashboard=False, **common)
    return check_resources(experiment)


def join(address: str, variables: Mapping[str, str], **options: Any) -> None:
    """Join the cluster at `address`; every process of the job gets `variables`, and no log of Ray's those that are secret.

    Args:
        options: of `ray.init`.
    """
    import ray

    seen, secret = credentials.divide(variables)
    environment: dict[str, Any] = {"env_vars": seen}
    if secret:
        promised, hook = credentials.promise()
        environment = {"env_vars": seen | promised, "worker_process_setup_hook": hook}
    ray.init(address=address, runtime_env=environment, **options)
    if secret:
        credentials.deliver(promised, secret)


def check_resources(experiment: AnyExperiment) -> None:
    """See that the cluster holds the fewest workers that the run may have; a job that was submitted again waits for nodes first.

    Raises:
        ConfigError: it does not.
    """
    import ray

    scaling = experiment.scaling
    needs = {"CPU": scaling.fewest_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        needs["GPU"] = scaling.fewest_workers
    have = ray.cluster_resources()
    deadline = time.monotonic() + (_JOIN_S if RESUBMITTED in os.environ else 0.0)
    while any(have.get(name, 0) < wanted for name, wanted in needs.items()) and time.monotonic() < deadline:
        time.sleep(1.0)
        have = ray.cluster_resources()
    for name, wanted in needs.items():
        if have.get(name, 0) < wanted:
            raise ConfigError(
                f"scaling.num_workers: {scaling.fewest_workers} workers need {wanted} {name}s together, "
                f"the cluster has {have.get(name, 0):g}; ask for fewer workers or add nodes"
            )


def job_environment(experiment: AnyExperiment, uri: str) -> dict[str, str]:
    """Variables that Ray's processes get on purpose; on a cluster they share neither the driver's folder nor its environment."""
    return {
        **credentials.gather(os.environ, s3=uses_s3(experiment)),
        "OMP_NUM_THREADS": str(experiment.scaling.threads),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def uses_s3(experiment: AnyExperiment) -> bool:
    """Whether the run reads or writes an object store."""
    return any(uri.startswith("s3://") for uri in (experiment.storage.path, *places_read(experiment).values()))
