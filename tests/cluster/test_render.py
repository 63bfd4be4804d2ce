"""Rendered files against the real schemas: KubeRay's CRDs, and Ray's own of a cluster's file."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.render import aws, kuberay
from cluster.request import ClusterRequest
from orchestrator.cli.app import run
from orchestrator.experiments.load import load_experiment
from orchestrator.launch.machines import request_of
from tests.places import SHARED_DATA
from workloads.errors import ConfigError

CRDS = SHARED_DATA / "kuberay"

PLAIN = ClusterRequest(
    name="Caltech_R18.a-0123abcd",
    experiment_yaml="name: tiny\n",
    ray_version="2.60.0",
    fewest_workers=1,
    most_workers=4,
    cpus_per_worker=4,
    memory_gib=8,
)
KINDS = {
    "plain": PLAIN,
    "gpu": replace(PLAIN, gpus_per_worker=1, environment={"AWS_REGION": "eu-west-1"}),
    "on demand": replace(PLAIN, spot=False, fewest_workers=2, most_workers=2, tracking_uri="https://mlflow.example"),
    "sweep": replace(PLAIN, command="sweep", name="x" * 90),
}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON schema that refuses unknown fields, which the API server would drop silently."""
    made = copy.deepcopy(schema)

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.pop("x-kubernetes-int-or-string", False):
                node.pop("type", None)
                node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            for value in list(node.values()):
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(made)
    return made


@pytest.fixture(scope="module")
def spec_schema() -> dict[str, Any]:
    path = CRDS / "ray.io_rayjobs.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}")
    versions = {v["name"]: v for v in yaml.safe_load(path.read_text())["spec"]["versions"]}
    return strict(versions["v1"]["schema"]["openAPIV3Schema"]["properties"]["spec"])


def pod_schema(spec_schema: dict[str, Any]) -> dict[str, Any]:
    cluster = spec_schema["properties"]["rayClusterSpec"]["properties"]
    found: dict[str, Any] = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]
    return found


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_what_kuberay_takes(spec_schema: dict[str, Any], kind: str):
    made = documents(kuberay.render_job(KINDS[kind]))
    jsonschema.validate(made["RayJob"]["spec"], spec_schema)
    assert len(made["RayJob"]["metadata"]["name"]) <= 47
    broken = copy.deepcopy(made["RayJob"]["spec"])
    broken["rayClusterSpec"]["headGroupSpec"]["rayStartParms"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParms"):
        jsonschema.validate(broken, spec_schema)


def test_the_mlflow_servers_pod_is_one(spec_schema: dict[str, Any]):
    made = documents(kuberay.render_mlflow(PLAIN))
    pod = made["Deployment"]["spec"]["template"]["spec"]
    jsonschema.validate(pod, pod_schema(spec_schema))
    assert made["Deployment"]["spec"]["selector"]["matchLabels"] == made["Service"]["spec"]["selector"]
    volume = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert volume == made["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= pod["containers"][0].keys()
    address = f"http://{made['Service']['metadata']['name']}:{made['Service']['spec']['ports'][0]['port']}"
    assert address in kuberay.render_job(PLAIN)  # where the run looks for it


def pods_of(text: str) -> list[dict[str, Any]]:
    """Every pod's spec in the documents."""
    found: list[dict[str, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "containers" in node:
                found.append(node)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    for document in yaml.safe_load_all(text):
        walk(document)
    return found


def test_nobody_is_root_and_everybody_says_what_it_needs():
    pods = pods_of(kuberay.render_job(KINDS["gpu"])) + pods_of(kuberay.render_mlflow(PLAIN))
    assert len(pods) == 4  # submitter, head, workers, MLflow
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["runAsUser"] == 1000 and security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_the_run_can_be_taken_up_again_and_workers_come_and_go():
    spec = documents(kuberay.render_job(KINDS["gpu"]))["RayJob"]["spec"]
    assert spec["backoffLimit"] == 3 and spec["shutdownAfterJobFinishes"] is True
    assert spec["entrypoint"] == "python -m orchestrator train /etc/orchestrator/experiment.yaml"
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    group = cluster["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    pod = group["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1" and resources["requests"]["memory"] == "8Gi"
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {t["key"] for t in pod["tolerations"]}
    assert "tolerations" not in yaml.safe_dump(documents(kuberay.render_job(KINDS["on demand"])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_aws_file_is_what_ray_up_takes(kind: str):
    text = aws.render(KINDS[kind], region="eu-west-1", instance_profile="trainer", worker_type="g5.2xlarge")
    config = yaml.safe_load(text)
    validate_config(prepare_config(copy.deepcopy(config)))  # as `ray up` does
    worker = config["available_node_types"]["trainer"]
    assert worker["max_workers"] == KINDS[kind].most_workers == config["max_workers"]
    assert worker["node_config"]["IamInstanceProfile"] == {"Name": "trainer"}
    assert ("InstanceMarketOptions" in worker["node_config"]) == KINDS[kind].spot
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["idle_timeout_minutes"] == 10
    assert all("RAY_AUTH_MODE=token" in config[f"{who}_start_ray_commands"][1] for who in ("head", "worker"))
    with pytest.raises((RuntimeError, jsonschema.ValidationError), match="max_wokers"):
        validate_config(prepare_config({**copy.deepcopy(config), "max_wokers": 3}))


EXPERIMENT = ["data.uri=s3://bucket/train", "evaluation.uri=s3://bucket/val", "storage.path=s3://bucket/runs"]


def test_no_secret_gets_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "planted-s3cret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://me:planted-s3cret@s3.example")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    name = ["anchor_ntxent_caltech", *EXPERIMENT, "scaling.num_workers=[1, 4]", "backbone.norm=group"]
    assert run(["cluster", "render", "kuberay", *name, "--output", str(tmp_path)]) == 0, capsys.readouterr().err
    given = ["--region", "eu-west-1", "--instance-profile", "trainer", "--worker-type", "m7i.xlarge"]
    assert run(["cluster", "render", "aws", *name, "--output", str(tmp_path), *given]) == 0, capsys.readouterr().err
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == ["aws.yaml", "rayjob.yaml"]  # there is an MLflow already
    for path in written:
        assert "planted" not in path.read_text()
        assert "https://mlflow.example" in path.read_text()
    config = documents((tmp_path / "rayjob.yaml").read_text())["ConfigMap"]
    (tmp_path / "back.yaml").write_text(config["data"]["experiment.yaml"])
    assert load_experiment(str(tmp_path / "back.yaml")) == load_experiment(name[0], name[1:])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert run(["cluster", "render", "kuberay", *name, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "mlflow.yaml").is_file()


@pytest.mark.parametrize("key", ["data.uri", "evaluation.uri", "storage.path"])
def test_what_only_this_machine_has_is_refused(key: str):
    given = [text for text in EXPERIMENT if not text.startswith(key)]
    loaded = load_experiment("anchor_ntxent_caltech", [*given, f"{key}=here"])
    with pytest.raises(ConfigError, match=f"{key}: .*here is a place of this machine"):
        request_of(loaded, image="i", memory_gib=None, measure=False, spot=True, retries=3)


def test_a_password_in_the_tracking_address_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example")
    with pytest.raises(ConfigError, match="holds a password"):
        request_of(
            load_experiment("anchor_ntxent_caltech", EXPERIMENT),
            image="i",
            memory_gib=None,
            measure=False,
            spot=True,
            retries=3,
        )
