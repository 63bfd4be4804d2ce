"""Connects a command to Ray: to the cluster at RAY_ADDRESS, or to a local one that it starts.

`start_ray` serves training and sweeps, `connect` every command. Both choose the environment variables that Ray's processes
receive; credentials among them travel as `credentials` describes.
"""

import functools
import logging
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.experiments.spec import AnyExperiment, ScalingConfig, places_read
from orchestrator.ray_support import credentials
from orchestrator.ray_support.errors import sentence
from orchestrator.ray_support.private import contract_fault, has_key_value_store
from orchestrator.ray_support.spare_processes import importing, node_imports
from workloads.errors import ConfigError, RunFailedError

logger = logging.getLogger(__name__)

RESUBMITTED = "ORCHESTRATOR_RESUBMITTED"
"""Variable of a job that was submitted again after the first was lost, perhaps to a new head whose nodes have yet to join."""

_JOIN_S = 120.0
_ANSWER_S = 10.0
_LONGEST_SOCKET, _SOCKET_BELOW_TMP = 107, 72  # bytes of a socket's path, and of its part that Ray chooses


def on_cluster() -> bool:
    """Whether this process joins a cluster (a submitted job has RAY_ADDRESS set) rather than starting a local Ray."""
    return bool(os.environ.get("RAY_ADDRESS"))


def is_trial() -> bool:
    """Whether this process is a sweep's trial, an actor, rather than a driver."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def uses_fast_paths(scaling: ScalingConfig) -> bool:
    """Whether a run with `scaling` starts by private interfaces of Ray; logs one line if it would but for the installed Ray."""
    wanted = scaling.fast_start
    if wanted is None:
        wanted = not on_cluster() or node_imports()
    if not wanted:
        return False
    fault = contract_fault()
    if fault is not None:
        _warn_once(f"scaling.fast_start: the fast paths are off, runs start and recover some seconds slower: {fault}")
    return fault is None


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def start_ray(experiment: AnyExperiment, *, uri: str, preload: str, debug: bool, trials: int = 1) -> None:
    """Connect to Ray for training; a process that is connected only checks the resources.

    Args:
        uri: of the tracking store.
        preload: module that idle processes of a local Ray import, where fast paths are used.
        trials: of a sweep, at the same time; a local Ray gets CPUs for so many.

    Raises:
        ConfigError: no cluster answers at RAY_ADDRESS, or it is too small for what `scaling` asks.
        RunFailedError: a local Ray did not start.
    """
    import ray

    scaling = experiment.scaling
    os.environ.update(_train_settings(scaling, preload))
    if not ray.is_initialized():
        cpus = trials * scaling.most_workers * scaling.cpus_per_worker
        connect(os.environ.get("RAY_ADDRESS"), job_environment(experiment, uri), cpus=cpus, debug=debug)
    check_resources(experiment)


def _train_settings(scaling: ScalingConfig, preload: str) -> dict[str, str]:
    """Variables that Ray Train and a local Ray read when they start. `RAY_TRAIN_*` are documented, the others are not."""
    fast = uses_fast_paths(scaling)
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(scaling.poll_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(scaling.start_timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(scaling.hang_timeout_s),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Ray's own watcher takes a process. `PreemptionThread` does its work on the fast path; a local Ray loses no node.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if on_cluster() and not fast else "0",
        "RAY_worker_niceness": str(scaling.niceness),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if not on_cluster():
        settings["RAY_TRAIN_METRICS_ENABLED"] = "0"
        settings |= importing(preload) if fast else {}
    return settings


def connect(
    address: str | None, variables: Mapping[str, str] | None = None, *, cpus: int = 0, debug: bool = False
) -> None:
    """Join the cluster at `address`, or start a local Ray in this process if it is None or "local".

    Does nothing in a process that is connected.

    Args:
        variables: that every process of the job gets; no log or page of Ray's shows those that are secret. By default the
            addresses and credentials of the stores that this process has.
        cpus: logical CPUs of a local Ray, at least as many as the machine has cores. A machine with fewer runs, slower.

    Raises:
        ConfigError: no cluster answers at `address`.
        RunFailedError: a local Ray did not start.
    """
    import ray

    if ray.is_initialized():
        return
    if variables is None:
        variables = credentials.gather(os.environ, s3=True)
    options: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
        "configure_logging": True,
    }
    if address is None or address == "local":
        return _start_local(variables, max(cpus, os.cpu_count() or 1), options)
    _check_answers(address)
    # For the whole job, since Ray's controller reads the run's storage as the workers do. A submitted job has an
    # environment of its own, where this process got the same values from: what is given here wins.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    plain, secret = credentials.divide(variables)
    environment: dict[str, Any] = {"env_vars": plain}
    if secret and not has_key_value_store():
        raise ConfigError(
            f"Ray {ray.__version__} has no key-value store to pass credentials through ({', '.join(sorted(secret))}); "
            "give the cluster's nodes their own (an instance role, a Secret) and unset them here"
        )
    if secret:
        key, hook = credentials.promise()
        # Ray would unpack the working directory, credentials file included, on nodes where no process of the job removes it.
        lazily = {"eager_install": False}
        environment = {"env_vars": plain | key, "worker_process_setup_hook": hook, "config": lazily}
    ray.init(address=address, runtime_env=environment, **options)
    if secret:
        credentials.deliver(key, secret)


def _start_local(variables: Mapping[str, str], cpus: int, options: Mapping[str, Any]) -> None:
    """Start Ray in this process, whose environment its processes inherit; once more if it does not come up."""
    import ray

    # Nothing else of Ray is needed inside one process.
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", **variables})
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(temporary.encode()) > _LONGEST_SOCKET - _SOCKET_BELOW_TMP:
        os.environ["RAY_TMPDIR"] = "/tmp"  # the path of a socket may be no longer
    began = time.monotonic()
    for attempt in (1, 2):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
            return
        except Exception as error:  # Ray has no class of its own for this
            ray.shutdown()
            if attempt == 2:
                waited = time.monotonic() - began
                raise RunFailedError(
                    f"a local Ray did not start in two attempts and {waited:.0f} s ({sentence(error)}); "
                    "see that the machine has memory and cores to spare, or set RAY_ADDRESS to a running cluster"
                ) from error
            logger.warning("a local Ray did not start, trying once more: %s", error)


def _check_answers(address: str) -> None:
    """Raise unless something listens at `address`: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and others, which Ray resolves
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S / 2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"RAY_ADDRESS: no cluster answers at {address} ({error}); "
                    "give the address of a running one, or unset it to run on this machine"
                ) from None
        time.sleep(0.5)


def check_resources(experiment: AnyExperiment) -> None:
    """Check that the cluster has room for the fewest workers of the run; a job that was submitted again waits for nodes first.

    Raises:
        ConfigError: it has not.
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
    """The variables that the processes of a run get; on a cluster they share neither the driver's folder nor its environment."""
    return {
        **credentials.gather(os.environ, s3=uses_s3(experiment)),
        "OMP_NUM_THREADS": str(experiment.scaling.threads),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def uses_s3(experiment: AnyExperiment) -> bool:
    """Whether the run reads or writes an object store."""
    return any(uri.startswith("s3://") for uri in (experiment.storage.path, *places_read(experiment).values()))
