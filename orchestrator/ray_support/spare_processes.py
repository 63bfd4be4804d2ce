"""Spare processes: started, and their imports done, before anybody needs them.

An actor of Ray takes an idle process of its own environment if its node has one: in 0.1 to 0.2 s, where starting a process and
importing torch, torchvision and Ray Train took 7 to 9 s on two busy cores. So whatever runs orders a process like its own for
whoever comes after it: for the worker that replaces it when it dies, or for a sweep's next trial.

Ray imports the modules in a process before it has work only where the node was started with `RAY_preload_python_modules`,
as a Ray of our own is; elsewhere a spare saves the start of the process, but not the imports.
"""

import contextlib
import importlib
import json
import threading
from typing import Any

_KEPT_S = 24 * 3600
_TIMEOUT_S = 10.0

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
        _order(count, ray.get_runtime_context().get_runtime_env_string() if environment is None else environment)


def order_first(workers: int) -> None:
    """Order the first processes of a run, while its driver still has other things to do."""
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal.constants import (
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        get_env_vars_to_propagate,
    )

    # What Ray Train gives its controller, and the controller's actors inherit.
    told = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    inherited = get_env_vars_to_propagate() | told
    order(2, environment=RuntimeEnv(env_vars=inherited).serialize())  # the controller, and what workers wait by
    workers_own = {"env_vars": inherited | WORKER_ENVIRONMENT["env_vars"]}
    # Nodes compare environments as text, and Ray writes one that is merged with its parent's without spaces.
    order(workers, environment=json.dumps(workers_own, sort_keys=True, separators=(",", ":")))


def order_later(after_s: float = 0.0) -> None:
    """Order one process like this one, from a thread, in a while."""
    timer = threading.Timer(after_s, order)
    timer.daemon = True
    timer.start()


def _order(count: int, environment: str) -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2_grpc

    messages: Any = importlib.import_module("ray.core.generated.node_manager_pb2")
    context = ray.get_runtime_context()
    mine = context.get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == mine)
    request = messages.PrestartWorkersRequest(
        job_id=bytes.fromhex(context.get_job_id()),
        num_workers=count,
        keep_alive_duration_secs=_KEPT_S,
    )
    request.runtime_env_info.serialized_runtime_env = environment
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_TIMEOUT_S)
    finally:
        channel.close()
