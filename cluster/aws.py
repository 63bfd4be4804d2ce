"""A `ray up` file for AWS: a head that takes no work, spot workers that come and go with it, no key in any file.

Machines reach S3 by the role of their instance profile. Ray's token is the user's own file, copied to each node over ssh; the
dashboard listens on the head's loopback, to be reached through `ray dashboard`.
"""

from typing import Any

import yaml

from cluster.request import ClusterRequest

_TOKEN = "~/.ray/auth_token"
_IDLE_MINUTES = 10
_DISK_GIB = 150


def render(
    request: ClusterRequest,
    *,
    region: str,
    instance_profile: str,
    worker_type: str,
    head_type: str = "m7i.large",
) -> str:
    """The file for `ray up`, as YAML.

    Args:
        instance_profile: name of one whose role may read and write the run's buckets.
        worker_type: EC2 instance type with room for one worker.
    """
    profile = {"IamInstanceProfile": {"Name": instance_profile}}
    disk = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": _DISK_GIB, "VolumeType": "gp3", "Encrypted": True}}]
    # Whoever gets into a container must not read the role's keys by way of a forwarded request.
    metadata = {"MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}}
    node = {**profile, "BlockDeviceMappings": disk, **metadata}
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}} if request.spot else {}
    variables = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **request.environment}
    if request.tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = request.tracking_uri
    exports = "export " + " ".join(f"{name}={value}" for name, value in variables.items())
    resources: dict[str, Any] = {"CPU": request.cpus_per_worker}
    if request.gpus_per_worker:
        resources["GPU"] = request.gpus_per_worker
    config = {
        "cluster_name": request.object_name,
        "max_workers": request.most_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": request.image,
            "container_name": "orchestrator",
            "run_options": ["--ulimit nofile=65536:65536", f"--shm-size={max(1, request.memory_gib // 4)}g"],
            **({} if request.gpus_per_worker else {"disable_automatic_runtime_detection": True}),
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},
                "min_workers": 0,
                "max_workers": 0,
                "node_config": {"InstanceType": head_type, **node},
            },
            "trainer": {
                "resources": resources,
                "min_workers": 0,  # the autoscaler starts them when the job asks, and ends them when it is done
                "max_workers": request.most_workers,
                "node_config": {"InstanceType": worker_type, **node, **spot},
            },
        },
        "file_mounts": {_TOKEN: _TOKEN},
        "head_start_ray_commands": [
            "ray stop",
            f"{exports} && chmod 600 {_TOKEN} && ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{exports} && chmod 600 {_TOKEN} && ray start --address=$RAY_HEAD_IP:6379",
        ],
    }
    told = (
        f"# {request.name} on AWS. Once: ray get-auth-token --generate\n"
        f"# Up:      RAY_AUTH_MODE=token ray up -y FILE\n"
        f"# Reach:   RAY_AUTH_MODE=token ray dashboard FILE      (leave it open; it forwards port 8265)\n"
        f"# Run:     RAY_AUTH_MODE=token orchestrator submit EXPERIMENT --address http://127.0.0.1:8265\n"
        f"# Down:    ray down -y FILE      (idle workers go by themselves after {_IDLE_MINUTES} minutes; the head does not)\n"
    )
    return told + yaml.safe_dump(config, sort_keys=False, width=1000)
