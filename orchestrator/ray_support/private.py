"""Imports every private name of Ray that this project uses, gives each a public wrapper, and checks them against the installed Ray.

Nothing else in the project imports a private module of Ray. All names but those of `KeyValueStore` and `job_client` serve fast
paths, which are optional: `fast_paths_hold()` is false for a Ray that `CHECKED_WITH` does not name or that lacks one of them,
and runs then use Ray's public interfaces alone. Ray is imported where a name is used, because processes that need none of Ray
Train import this.
"""

import contextlib
import functools
import importlib
import inspect
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback as PreemptionCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback as WorkerGroupCallback
    from ray.train.v2._internal.execution.controller import TrainController as TrainController
    from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
    from ray.train.v2._internal.execution.failure_handling import FailurePolicy as FailurePolicy
    from ray.train.v2._internal.execution.preemption import PreemptionWatcher as PreemptionWatcher
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy as ElasticScalingPolicy
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy as FixedScalingPolicy

CHECKED_WITH = "2.60"
"""The release of Ray whose private interfaces the fast paths were tested with."""

JOB_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",  # logs every upload
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.job.sdk",  # logs the end of every log stream
)
"""Names of the loggers of Ray's job client whose messages are no news to a user."""

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A private name, and what its users rely on."""

    module: str
    name: str  # in the module; a method as `Class.method`
    parameters: tuple[str, ...] | None = None  # of the callable, in order; None: it only has to exist

    def fault(self) -> str | None:
        """What the installed Ray has otherwise, in one sentence; None if nothing."""
        full = f"{self.module}.{self.name}"
        try:
            target: Any = functools.reduce(getattr, self.name.split("."), importlib.import_module(self.module))
        except (ImportError, AttributeError):
            return f"{full} is missing"
        if self.parameters is None:
            return None
        has = tuple(inspect.signature(target).parameters)
        return (
            None if has == self.parameters else f"{full} takes ({', '.join(has)}), not ({', '.join(self.parameters)})"
        )


_TRAIN = "ray.train.v2._internal"
_TRAINER = "ray.train.v2.api.data_parallel_trainer"

FAST_PATHS = (
    PrivateName(f"{_TRAIN}.execution.failure_handling", "FailureDecision.RETRY"),
    PrivateName(f"{_TRAIN}.execution.failure_handling", "FailureDecision.RAISE"),
    PrivateName(f"{_TRAIN}.execution.failure_handling", "FailurePolicy", ("failure_config",)),
    PrivateName(
        f"{_TRAIN}.execution.failure_handling", "FailurePolicy.make_decision", ("self", "training_failed_error")
    ),
    PrivateName(f"{_TRAIN}.execution.scaling_policy", "ElasticScalingPolicy", ("scaling_config",)),
    PrivateName(f"{_TRAIN}.execution.scaling_policy", "ElasticScalingPolicy._get_reserved_resources", ("self",)),
    PrivateName(f"{_TRAIN}.execution.scaling_policy", "FixedScalingPolicy", ("scaling_config",)),
    PrivateName(f"{_TRAIN}.execution.scaling_policy", "FixedScalingPolicy._maybe_send_resource_request", ("self",)),
    PrivateName(
        f"{_TRAIN}.execution.scaling_policy",
        "FixedScalingPolicy.after_controller_start",
        ("self", "train_run_context"),
    ),
    PrivateName(
        f"{_TRAIN}.execution.preemption",
        "PreemptionWatcher",
        ("node_to_ranks", "poll_interval_s", "worker_actors_by_rank"),
    ),
    PrivateName(f"{_TRAIN}.callbacks.preemption_callback", "PreemptionCallback", ()),
    PrivateName(f"{_TRAIN}.callbacks.preemption_callback", "PreemptionCallback._stop_watcher", ("self",)),
    PrivateName(
        f"{_TRAIN}.execution.callback", "WorkerGroupCallback.after_worker_group_start", ("self", "worker_group")
    ),
    PrivateName(
        f"{_TRAIN}.execution.controller",
        "TrainController",
        (
            *("train_fn_ref", "train_run_context", "scaling_policy", "failure_policy", "callbacks"),
            "validation_config",
        ),
    ),
    PrivateName(f"{_TRAIN}.execution.controller", "TrainController.run", ("self",)),
    PrivateName(f"{_TRAIN}.execution.controller", "TrainController.get_result", ("self",)),
    PrivateName(_TRAINER, "DataParallelTrainer._create_default_callbacks", ("self",)),
    PrivateName(_TRAINER, "DataParallelTrainer._initialize_and_run_controller", ("self", "controller_init_kwargs")),
    PrivateName(_TRAINER, "DatasetsCallback"),
    PrivateName(_TRAINER, "PlacementGroupCleanerCallback"),
    PrivateName(f"{_TRAIN}.constants", "get_env_vars_to_propagate", ()),
    PrivateName(f"{_TRAIN}.constants", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR"),
    PrivateName(f"{_TRAIN}.constants", "DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE"),
    PrivateName("ray._private.grpc_utils", "init_grpc_channel", ("address", "options", "asynchronous", "credentials")),
    PrivateName("ray.core.generated.node_manager_pb2_grpc", "NodeManagerServiceStub", ("channel",)),
    *(
        PrivateName("ray.core.generated.node_manager_pb2", f"PrestartWorkersRequest.{field}_FIELD_NUMBER")
        for field in ("JOB_ID", "NUM_WORKERS", "KEEP_ALIVE_DURATION_SECS", "RUNTIME_ENV_INFO")
    ),
)
"""What the fast paths need."""

KEY_VALUE_STORE = (
    PrivateName("ray.experimental.internal_kv", "_internal_kv_get", ("key", "namespace")),
    PrivateName("ray.experimental.internal_kv", "_internal_kv_put", ("key", "value", "overwrite", "namespace")),
    PrivateName("ray.experimental.internal_kv", "_internal_kv_exists", ("key", "namespace")),
    PrivateName("ray.experimental.internal_kv", "_internal_kv_del", ("key", "del_by_prefix", "namespace")),
    PrivateName("ray.experimental.internal_kv", "_internal_kv_list", ("prefix", "namespace")),
    PrivateName("ray._private.state", "GlobalState.job_table", ("self",)),
)
"""What `KeyValueStore` and the credentials need."""

JOB_CLIENT = (
    PrivateName(
        "ray.dashboard.modules.dashboard_sdk",
        "SubmissionClient._do_request",
        ("self", "method", "endpoint", "data", "json_data", "kwargs"),
    ),
)
"""What `orchestrator submit` needs: Ray's public client of the job API waits for an answer without end."""


def faults(names: tuple[PrivateName, ...] = FAST_PATHS) -> list[str]:
    """In which ways the installed Ray differs from what is used of it, one sentence each."""
    return [fault for name in names if (fault := name.fault()) is not None]


def fast_paths_hold() -> bool:
    """Whether the installed Ray is the one that the fast paths were tested with, and has every name that they need."""
    return contract_fault() is None


@functools.cache
def contract_fault() -> str | None:
    """Why the fast paths cannot be used with the installed Ray, in one sentence; None: they can."""
    import ray

    if ray.__version__.split(".")[:2] != CHECKED_WITH.split("."):
        return f"Ray {ray.__version__} is installed, they were tested with {CHECKED_WITH}"
    return next(iter(faults()), None)


def __getattr__(name: str) -> Any:
    """Import one of the classes that `training.policies` derives from."""
    for private in FAST_PATHS:
        if name == private.name.split(".")[0]:
            return getattr(importlib.import_module(private.module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class KeyValueStore:
    """Small values shared by all processes of a cluster, in Ray's internal key-value store on the head node.

    With a Ray that does not have it (`has_key_value_store`), in a named actor, which costs a process.
    """

    def __init__(self, namespace: str = "orchestrator") -> None:
        self._namespace = namespace

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        value: bytes | None = self._call("get", key)
        return value

    def put(self, key: str, value: str | bytes) -> None:
        """Set or replace a value."""
        self._call("put", key, value.encode() if isinstance(value, str) else value)

    def exists(self, key: str) -> bool:
        """Whether the key has a value."""
        return bool(self._call("exists", key))

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""
        return [key.decode() for key in self._call("list", prefix)]

    def delete(self, key: str) -> None:
        """Remove a value; nothing happens if there is none."""
        self._call("del", key)

    def _call(self, name: str, *arguments: str | bytes) -> Any:
        if has_key_value_store():
            from ray.experimental import internal_kv

            return getattr(internal_kv, f"_internal_kv_{name}")(*arguments, namespace=self._namespace)
        import ray

        options: Any = ray.remote(num_cpus=0)(_Values)
        actor = options.options(
            name="values", namespace=self._namespace, get_if_exists=True, lifetime="detached"
        ).remote()
        return ray.get(actor.call.remote(name, *arguments))


@functools.cache
def has_key_value_store() -> bool:
    """Whether the installed Ray has the key-value store as it is used here; actors cannot carry credentials in its place."""
    return not faults(KEY_VALUE_STORE)


class _Values:
    """The values of `KeyValueStore` in an actor."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def call(self, name: str, key: str, value: bytes = b"") -> bytes | bool | list[bytes] | None:
        match name:
            case "get":
                return self._values.get(key)
            case "exists":
                return key in self._values
            case "list":
                return [name.encode() for name in self._values if name.startswith(key)]
            case "put":
                self._values[key] = value
            case "del":
                self._values.pop(key, None)
        return None


def in_submitted_job() -> bool:
    """Whether this process is the driver of a job that was submitted through Ray's jobs API, or was started by one."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def submission_id() -> str | None:
    """The submission id of the job whose driver this process is; None: it was not submitted."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return metadata.get("job_submission_id")


def job_id() -> str:
    """The id of Ray's job that this process belongs to, in hexadecimal."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


def ended_jobs() -> set[str]:
    """The ids of the cluster's jobs whose driver has exited, in hexadecimal."""
    from ray._private.state import state

    return {job["JobID"] for job in state.job_table() if job["EndTime"]}


def prestart_workers(count: int, environment: str, *, keep_s: int) -> None:
    """Ask the raylet of this process's node to start idle worker processes.

    Args:
        environment: the serialized `runtime_env` of the actors that will use them.
        keep_s: how long an unused process stays.
    """
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2_grpc

    messages: Any = importlib.import_module("ray.core.generated.node_manager_pb2")
    context = ray.get_runtime_context()
    this_node = context.get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == this_node)
    request = messages.PrestartWorkersRequest(
        job_id=bytes.fromhex(context.get_job_id()), num_workers=count, keep_alive_duration_secs=keep_s
    )
    request.runtime_env_info.serialized_runtime_env = environment
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_TIMEOUT_S)
    finally:
        channel.close()


def inner_exception(error: BaseException) -> BaseException:
    """The exception inside one of Ray Train's wrappers of a worker's exception; `error` itself if it is none of them."""
    for attribute in (
        "_base_exc",
        "health_check_failure",
    ):  # of UserExceptionWithTraceback, WorkerHealthCheckFailedError
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            error = inner
    return error


def is_startup_timeout(error: BaseException) -> bool:
    """Whether the workers did not start in time."""
    return isinstance(error, _exceptions("WorkerGroupStartupTimeoutError"))


def is_hang(error: BaseException) -> bool:
    """Whether a worker neither answered nor died."""
    return isinstance(error, _exceptions("WorkerHealthCheckTimeoutError"))


def _exceptions(name: str) -> tuple[type[BaseException], ...]:
    with contextlib.suppress(ImportError, AttributeError):
        return (getattr(importlib.import_module(f"{_TRAIN}.exceptions"), name),)
    return ()


def controller_variables() -> dict[str, str]:
    """The environment variables that Ray Train gives its controller, and that the controller's actors inherit."""
    from ray.train.v2._internal.constants import (
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        get_env_vars_to_propagate,
    )

    warn = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    return {**get_env_vars_to_propagate(), **warn}


def job_client(address: str, *, timeout_s: tuple[float, float]) -> "JobSubmissionClient":
    """Ray's client of the job API at `address`, with a limit on the time to connect and the time to answer, seconds."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=timeout_s, **options)

    return BoundedClient(address)


def cluster_versions(client: "JobSubmissionClient") -> tuple[str, str]:
    """The releases of Ray and Python that a cluster runs.

    Raises:
        requests.RequestException, KeyError, ValueError: the address is not that of a dashboard.
    """
    answer = client._do_request("GET", "/api/v0/cluster_metadata")
    answer.raise_for_status()
    versions = answer.json()["data"]
    return versions["rayVersion"], versions["pythonVersion"]
