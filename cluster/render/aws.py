"""Renders a file for `ray up` on AWS: a head that runs no tasks, and autoscaled workers, on spot instances if wanted.

Machines reach S3 by the role of their instance profile, so no key is in the file. Ray's token is the user's own file, which
`ray up` copies to each node over ssh. The dashboard listens on the head's loopback; `ray dashboard` forwards it.
"""

import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.request import ClusterRequest, require

_TOKEN = "~/.ray/auth_token"
_IDLE_MINUTES = 10
_DISK_GIB = 150

Block = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsOptions:
    """Where on AWS the machines run, and which they are.

    Raises:
        ClusterRequestError: a value is not a name of AWS.
    """

    region: str
    instance_profile: str
    """Name of an instance profile whose role may read and write the run's buckets."""
    worker_type: str = "g5.2xlarge"
    """EC2 instance type that holds one worker."""
    head_type: str = "m7i.large"

    def __post_init__(self) -> None:
        require("--region", self.region, r"[a-z0-9-]+")
        require("--instance-profile", self.instance_profile, r"[\w+=,.@-]+")
        for value in (self.worker_type, self.head_type):
            require("--worker-type", value, r"[a-z0-9.-]+")


def render(request: ClusterRequest, options: AwsOptions) -> str:
    """The file for `ray up`, as YAML with a comment that says how to use it."""
    config: Block = {
        "cluster_name": request.object_name,
        "max_workers": request.most_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "provider": {"type": "aws", "region": options.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": _docker(request),
        "head_node_type": "head",
        "available_node_types": _node_types(request, options),
        "file_mounts": {_TOKEN: _TOKEN},
        **_start_commands(request),
    }
    return _usage(request) + yaml.safe_dump(config, sort_keys=False, width=1000)


def _usage(request: ClusterRequest) -> str:
    return (
        f"# {request.object_name} on AWS. Once: ray get-auth-token --generate\n"
        f"# Up:      RAY_AUTH_MODE=token ray up -y FILE\n"
        f"# Reach:   RAY_AUTH_MODE=token ray dashboard FILE      (leave it open; it forwards port 8265)\n"
        f"# Run:     RAY_AUTH_MODE=token orchestrator submit EXPERIMENT --address http://127.0.0.1:8265\n"
        f"# Down:    ray down -y FILE      (workers end after {_IDLE_MINUTES} idle minutes; the head runs until `ray down`)\n"
    )


def _docker(request: ClusterRequest) -> Block:
    shared_memory_gib = max(1, request.memory_gib // 4)
    return {
        "image": request.image,
        "container_name": "orchestrator",
        "run_options": ["--ulimit nofile=65536:65536", f"--shm-size={shared_memory_gib}g"],
        **({} if request.gpus_per_worker else {"disable_automatic_runtime_detection": True}),
    }


def _node_types(request: ClusterRequest, options: AwsOptions) -> Block:
    node = {
        "IamInstanceProfile": {"Name": options.instance_profile},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": _DISK_GIB, "VolumeType": "gp3", "Encrypted": True}}
        ],
        # A forwarded request from a container must not reach the role's keys: tokens only, two hops at most.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}} if request.spot else {}
    resources = {"CPU": request.cpus_per_worker}
    if request.gpus_per_worker:
        resources["GPU"] = request.gpus_per_worker
    return {
        "head": {
            "resources": {"CPU": 0},
            "min_workers": 0,
            "max_workers": 0,
            "node_config": {"InstanceType": options.head_type, **node},
        },
        "trainer": {
            "resources": resources,
            "min_workers": 0,  # the autoscaler starts workers when the job asks for them, and ends them when they are idle
            "max_workers": request.most_workers,
            "node_config": {"InstanceType": options.worker_type, **node, **spot},
        },
    }


def _start_commands(request: ClusterRequest) -> Block:
    """Shell commands that start Ray; every value in them is quoted."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **request.environment}
    if request.tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = request.tracking_uri
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    prepared = f"export {exports} && chmod 600 {_TOKEN}"
    return {
        "head_start_ray_commands": [
            "ray stop",
            f"{prepared} && ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{prepared} && ray start --address=$RAY_HEAD_IP:6379"],
    }
