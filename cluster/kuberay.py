"""Kubernetes manifests for KubeRay: one RayJob that makes its cluster, runs, and goes away; and MLflow's server beside it.

A job that ended from outside is retried by KubeRay with a cluster of its own; the run goes on by its name from the storage.
KubeRay makes the cluster's token and gives it to the pods (`authOptions`); the stores' credentials are in a Secret that the
manifests only name.
"""

from typing import Any

import yaml

from cluster.request import ClusterRequest

CREDENTIALS = "orchestrator-credentials"
"""Secret with the object store's and MLflow's variables (AWS_ACCESS_KEY_ID, …); it may be missing where nodes have a role."""

MLFLOW = "orchestrator-mlflow"
_FOLDER = "/etc/orchestrator"
_USER = 1000
_MLFLOW_PORT = 5000

_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": _USER,
}
_POD_SECURITY = {"fsGroup": _USER, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def render_job(request: ClusterRequest) -> str:
    """The experiment's ConfigMap and the RayJob, as YAML."""
    experiment = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": request.object_name, "labels": _labels(request)},
        "data": {"experiment.yaml": request.experiment_yaml},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": request.object_name, "labels": _labels(request)},
        "spec": {
            "entrypoint": f"python -m orchestrator {request.command} {_FOLDER}/experiment.yaml"
            + (" --resume" if request.command == "sweep" else ""),
            "submissionMode": "K8sJobMode",
            "backoffLimit": request.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "metadata": {"mlflow.run_name": request.name},
            "submitterPodTemplate": {
                "spec": {
                    "restartPolicy": "Never",
                    "securityContext": _POD_SECURITY,
                    "containers": [
                        {
                            "name": "ray-job-submitter",
                            "image": request.image,
                            "securityContext": _CONTAINER_SECURITY,
                            "resources": _resources(cpu="200m", memory="512Mi"),
                        }
                    ],
                }
            },
            "rayClusterSpec": {
                "rayVersion": request.ray_version,
                "enableInTreeAutoscaling": True,
                "authOptions": {"mode": "token"},
                "autoscalerOptions": {
                    "idleTimeoutSeconds": 120,
                    "upscalingMode": "Default",
                    "securityContext": {**_CONTAINER_SECURITY},
                    "resources": _resources(cpu="200m", memory="512Mi"),
                },
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": {
                        "metadata": {"labels": _labels(request)},
                        "spec": _head(request),
                    },
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "trainers",
                        "replicas": request.fewest_workers,
                        "minReplicas": request.fewest_workers,
                        "maxReplicas": request.most_workers,
                        "rayStartParams": {"num-cpus": str(request.cpus_per_worker)},
                        "template": {"metadata": {"labels": _labels(request)}, "spec": _worker(request)},
                    }
                ],
            },
        },
    }
    return _documents(experiment, job)


def render_mlflow(request: ClusterRequest, *, storage_gib: int = 20) -> str:
    """MLflow's server with a volume of its own for its database and artifacts, as YAML."""
    labels = {"app.kubernetes.io/name": MLFLOW, "app.kubernetes.io/part-of": "orchestrator"}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": MLFLOW, "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{storage_gib}Gi"}}},
    }
    probe = {"httpGet": {"path": "/health", "port": _MLFLOW_PORT}, "periodSeconds": 10, "timeoutSeconds": 5}
    server = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": MLFLOW, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two servers would share one SQLite file
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "securityContext": _POD_SECURITY,
                    "automountServiceAccountToken": False,
                    "containers": [
                        {
                            "name": "mlflow",
                            "image": request.image,
                            "command": [
                                *("mlflow", "server", "--host", "0.0.0.0", "--port", str(_MLFLOW_PORT)),
                                *("--backend-store-uri", "sqlite:////mlflow/mlflow.db"),
                                *("--artifacts-destination", "/mlflow/artifacts", "--workers", "1"),
                                *("--allowed-hosts", f"{MLFLOW}:*,localhost:*"),
                            ],
                            "env": _variables(
                                {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
                            ),
                            "ports": [{"containerPort": _MLFLOW_PORT, "name": "http"}],
                            "startupProbe": {**probe, "failureThreshold": 30},
                            "readinessProbe": probe,
                            "livenessProbe": {**probe, "failureThreshold": 6},
                            "resources": _resources(cpu="500m", memory="1Gi"),
                            "securityContext": _CONTAINER_SECURITY,
                            "volumeMounts": [{"name": "state", "mountPath": "/mlflow"}],
                        }
                    ],
                    "volumes": [{"name": "state", "persistentVolumeClaim": {"claimName": MLFLOW}}],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": MLFLOW, "labels": labels},
        "spec": {
            "type": "ClusterIP",
            "selector": labels,
            "ports": [{"name": "http", "port": _MLFLOW_PORT, "targetPort": _MLFLOW_PORT}],
        },
    }
    return _documents(claim, server, service)


def _head(request: ClusterRequest) -> dict[str, Any]:
    container = _ray_container(
        request, name="ray-head", resources=_resources(cpu="2", memory="8Gi"), path="gcs_healthz"
    )
    container["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 8080, "name": "metrics"},
    ]
    container["volumeMounts"].append({"name": "experiment", "mountPath": _FOLDER, "readOnly": True})
    return {
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": [*_volumes("2Gi"), {"name": "experiment", "configMap": {"name": request.object_name}}],
    }


def _worker(request: ClusterRequest) -> dict[str, Any]:
    resources = _resources(cpu=str(request.cpus_per_worker), memory=f"{request.memory_gib}Gi")
    tolerations = []
    if request.gpus_per_worker:
        for kind in ("requests", "limits"):
            resources[kind]["nvidia.com/gpu"] = str(request.gpus_per_worker)
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if request.spot:
        # The taints of GKE, EKS with Karpenter, and AKS.
        for key in ("cloud.google.com/gke-spot", "karpenter.sh/disruption", "kubernetes.azure.com/scalesetpriority"):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
    spec = {
        "securityContext": _POD_SECURITY,
        "containers": [_ray_container(request, name="ray-worker", resources=resources, path="local_raylet_healthz")],
        "volumes": _volumes(f"{max(1, request.memory_gib // 4)}Gi"),
        "terminationGracePeriodSeconds": 60,  # the time in which a worker saves a checkpoint
    }
    return {**spec, "tolerations": tolerations} if tolerations else spec


def _ray_container(request: ClusterRequest, *, name: str, resources: dict[str, Any], path: str) -> dict[str, Any]:
    asked = f"http://localhost:{8265 if path.startswith('gcs') else 52365}/api/{path}"
    python = f"import urllib.request as r; assert b'success' in r.urlopen('{asked}', timeout=4).read()"
    probe = {"exec": {"command": ["python", "-c", python]}, "periodSeconds": 10, "timeoutSeconds": 5}
    uri = request.tracking_uri or f"http://{MLFLOW}:{_MLFLOW_PORT}"
    return {
        "name": name,
        "image": request.image,
        "env": _variables({"MLFLOW_TRACKING_URI": uri, **request.environment}),
        "envFrom": [{"secretRef": {"name": CREDENTIALS, "optional": True}}],
        "resources": resources,
        "readinessProbe": {**probe, "initialDelaySeconds": 10, "failureThreshold": 10},
        "livenessProbe": {**probe, "initialDelaySeconds": 60, "failureThreshold": 20},
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _volumes(shared_memory: str) -> list[dict[str, Any]]:
    # A container's own /dev/shm has 64 MiB, too little for Ray's object store.
    return [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}]


def _resources(*, cpu: str, memory: str) -> dict[str, Any]:
    """As much as is needed, and no memory beyond it, or the node's other pods would pay."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _labels(request: ClusterRequest) -> dict[str, str]:
    return {"app.kubernetes.io/name": request.object_name, "app.kubernetes.io/part-of": "orchestrator"}


class _Plain(yaml.SafeDumper):
    """Without anchors, which people find hard to read and to change."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _documents(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000)
