"""Standby processes: Ray workers that are started, and have imported what they need, before an actor takes them.

An actor of Ray takes an idle process of its own `runtime_env` if its node has one: in 0.1 to 0.2 s, where starting a process and
importing torch, torchvision and Ray Train took 7 to 9 s on two busy cores. Each worker therefore asks its node to keep one
standby process with the same environment, which a restarted worker or the sweep's next trial takes over.

Ray imports the modules in a process before it has work only where the node was started with `RAY_preload_python_modules`,
as a local Ray is; elsewhere a standby process saves the start of the process, but not the imports.
"""

import contextlib
import json
import os
import threading

from orchestrator.ray_support.private import controller_variables, prestart_workers

_KEEP_S = 24 * 3600
_PRELOAD = "RAY_preload_python_modules"

ROLE, WORKER = "ORCHESTRATOR_ROLE", "worker"

WORKER_ENVIRONMENT = {"env_vars": {ROLE: WORKER}}
"""The `runtime_env` of workers: the preloaded module imports what they need, and Ray keeps their standby processes for them."""


def importing(module: str) -> dict[str, str]:
    """Variables for the start of a node on which every idle process imports `module` first."""
    # Ray starts a process for each CPU unasked, without the environment by which ours are known.
    return {_PRELOAD: module, "RAY_prestart_worker_first_driver": "0"}


def node_imports() -> bool:
    """Whether this process's node was started with `importing` a module of this project; processes of a node inherit it."""
    return os.environ.get(_PRELOAD, "").startswith("orchestrator.")


def order(count: int = 1, *, environment: str | None = None) -> None:
    """Ask this process's node for standby processes; best effort, since without them all goes on, only slower.

    Args:
        environment: the serialized `runtime_env` of the actors that will take them; by default this process's own.
    """
    import ray

    with contextlib.suppress(Exception):
        wanted = ray.get_runtime_context().get_runtime_env_string() if environment is None else environment
        prestart_workers(count, wanted, keep_s=_KEEP_S)


def order_first(workers: int) -> None:
    """Order the first processes of a run, while its driver still has other things to do."""
    from ray.runtime_env import RuntimeEnv

    inherited = controller_variables()
    order(2, environment=RuntimeEnv(env_vars=inherited).serialize())  # the controller, and the workers' barrier actor
    workers_own = {"env_vars": inherited | WORKER_ENVIRONMENT["env_vars"]}
    # Nodes compare environments as text, and Ray writes one that is merged with its parent's without spaces.
    order(workers, environment=json.dumps(workers_own, sort_keys=True, separators=(",", ":")))


def order_later(after_s: float = 0.0) -> None:
    """Order one process like this one after a delay, from a thread."""
    timer = threading.Timer(after_s, order)
    timer.daemon = True
    timer.start()
