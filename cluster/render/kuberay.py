"""Renders Kubernetes manifests for KubeRay: `render_job` a RayJob with its own cluster, `render_mlflow` an MLflow server.

KubeRay retries a failed job on a new cluster; the run has the same name, so it continues from its storage. KubeRay creates the
cluster's token and gives it to the pods (`authOptions`). The stores' credentials are in a Secret that the manifests only name.
"""

from typing import Any

import yaml

from cluster.request import ClusterRequest

Block = dict[str, Any]

CREDENTIALS = "orchestrator-credentials"
"""Name of the Secret with the variables of the object store and MLflow (AWS_ACCESS_KEY_ID, …); optional where nodes have a role."""

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
    metadata = {"name": request.object_name, "labels": _labels(request)}
    experiment = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"experiment.yaml": request.experiment_yaml},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": f"python -m orchestrator {request.command} {_FOLDER}/experiment.yaml"
            + (" --resume" if request.command == "sweep" else ""),
            "submissionMode": "K8sJobMode",
            "backoffLimit": request.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "metadata": {"mlflow.run_name": request.name},
            "submitterPodTemplate": {"spec": _submitter(request)},
            "rayClusterSpec": _cluster(request),
        },
    }
    return _documents(experiment, job)


def _submitter(request: ClusterRequest) -> Block:
    container = {
        "name": "ray-job-submitter",
        "image": request.image,
        "securityContext": _CONTAINER_SECURITY,
        "resources": _resources(cpu="200m", memory="512Mi"),
    }
    return {"restartPolicy": "Never", "securityContext": _POD_SECURITY, "containers": [container]}


def _cluster(request: ClusterRequest) -> Block:
    metadata = {"labels": _labels(request)}
    return {
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
            "template": {"metadata": metadata, "spec": _head(request)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "trainers",
                "replicas": request.fewest_workers,
                "minReplicas": request.fewest_workers,
                "maxReplicas": request.most_workers,
                "rayStartParams": {"num-cpus": str(request.cpus_per_worker)},
                "template": {"metadata": metadata, "spec": _worker(request)},
            }
        ],
    }


def render_mlflow(request: ClusterRequest, *, storage_gib: int = 20) -> str:
    """An MLflow server with a volume for its database and artifacts, as YAML."""
    labels = {"app.kubernetes.io/name": MLFLOW, "app.kubernetes.io/part-of": "orchestrator"}
    metadata = {"name": MLFLOW, "labels": labels}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{storage_gib}Gi"}}},
    }
    pod = {
        "securityContext": _POD_SECURITY,
        "automountServiceAccountToken": False,
        "containers": [_mlflow_container(request)],
        "volumes": [{"name": "state", "persistentVolumeClaim": {"claimName": MLFLOW}}],
    }
    server = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two servers would share one SQLite file
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": "ClusterIP",
            "selector": labels,
            "ports": [{"name": "http", "port": _MLFLOW_PORT, "targetPort": _MLFLOW_PORT}],
        },
    }
    return _documents(claim, server, service)


def _mlflow_container(request: ClusterRequest) -> Block:
    probe = {"httpGet": {"path": "/health", "port": _MLFLOW_PORT}, "periodSeconds": 10, "timeoutSeconds": 5}
    names = (MLFLOW, f"{MLFLOW}.*.svc", f"{MLFLOW}.*.svc.cluster.local", "localhost", "127.0.0.1")
    hosts = ",".join(f"{name},{name}:*" for name in names)
    return {
        "name": "mlflow",
        "image": request.image,
        "command": [
            *("mlflow", "server", "--host", "0.0.0.0", "--port", str(_MLFLOW_PORT)),
            *("--backend-store-uri", "sqlite:////mlflow/mlflow.db"),
            *("--artifacts-destination", "/mlflow/artifacts", "--workers", "1", "--allowed-hosts", hosts),
        ],
        "env": _variables({"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
        "ports": [{"containerPort": _MLFLOW_PORT, "name": "http"}],
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
        "resources": _resources(cpu="500m", memory="1Gi"),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "state", "mountPath": "/mlflow"}],
    }


def _head(request: ClusterRequest) -> Block:
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


def _worker(request: ClusterRequest) -> Block:
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
        "terminationGracePeriodSeconds": 60,  # time to save a checkpoint, seconds
    }
    return {**spec, "tolerations": tolerations} if tolerations else spec


def _ray_container(request: ClusterRequest, *, name: str, resources: Block, path: str) -> Block:
    url = f"http://localhost:{8265 if path.startswith('gcs') else 52365}/api/{path}"
    python = f"import urllib.request as r; assert b'success' in r.urlopen('{url}', timeout=4).read()"
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


def _volumes(shared_memory: str) -> list[Block]:
    # A container's own /dev/shm has 64 MiB, too little for Ray's object store.
    return [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}]


def _resources(*, cpu: str, memory: str) -> Block:
    """Requests of CPU and memory, and the same limit of memory, so that a pod cannot take its neighbours'."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    # Kubernetes expands $(NAME) in values, and reads $$ as $.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in values.items()]


def _labels(request: ClusterRequest) -> dict[str, str]:
    return {"app.kubernetes.io/name": request.object_name, "app.kubernetes.io/part-of": "orchestrator"}


class _Plain(yaml.SafeDumper):
    """Writes repeated blocks in full instead of YAML anchors, which are hard to read and to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _documents(*documents: Block) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000)
