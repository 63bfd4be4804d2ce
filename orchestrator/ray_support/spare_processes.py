"""Spare processes: started, and their imports done, before anybody needs them.

An actor of Ray takes an idle process of its own environment if its node has one: in 0.1 to 0.2 s, where starting a process and
importing torch, torchvision and Ray Train took 7 to 9 s on two busy cores. So whatever runs orders a process like its own for
whoever comes after it: for the worker that replaces it when it dies, or for a sweep's next trial.

Ray imports the modules in a process before it has work only where the node was started with `RAY_preload_python_modules`,
as a Ray of our own is; elsewhere a spare saves the start of the process, but not the imports.
"""

import contextlib
import json
import threading

from orchestrator.ray_support.private import controller_variables, prestart_workers

_KEPT_S = 24 * 3600

ROLE, WORKER = "ORCHESTRATOR_ROLE", "worker"

WORKER_ENVIRONMENT = {"env_vars": {ROLE: WORKER}}
"""The `runtime_env` of workers: it makes `preload` import what they need, and tells their spares from others'."""


def importing() -> dict[str, str]:
    """Variables for the start of a node on which every process begins with the imports of its role."""
    # Ray starts a process for each CPU unasked, without the environment by which ours are known.
    return {"RAY_preload_python_modules": "orchestrator.training.preload", "RAY_prestart_worker_first_driver": "0"}


def order(count: int = 1, *, environment: str | None = None) -> None:
    """Have this process's node start idle processes; best effort, since without them all goes on, only slower.

    Args:
        environment: the serialized `runtime_env` of the actors that will take them; by default this process's own.
    """
    import ray

    with contextlib.suppress(Exception):
        wanted = ray.get_runtime_context().get_runtime_env_string() if environment is None else environment
        prestart_workers(count, wanted, keep_s=_KEPT_S)


def order_first(workers: int) -> None:
    """Order the first processes of a run, while its driver still has other things to do."""
    from ray.runtime_env import RuntimeEnv

    inherited = controller_variables()
    order(2, environment=RuntimeEnv(env_vars=inherited).serialize())  # the controller, and what workers wait by
    workers_own = {"env_vars": inherited | WORKER_ENVIRONMENT["env_vars"]}
    # Nodes compare environments as text, and Ray writes one that is merged with its parent's without spaces.
    order(workers, environment=json.dumps(workers_own, sort_keys=True, separators=(",", ":")))


def order_later(after_s: float = 0.0) -> None:
    """Order one process like this one, from a thread, in a while."""
    timer = threading.Timer(after_s, order)
    timer.daemon = True
    timer.start()
