"""Rendered files against the real schemas: KubeRay's CRDs, and Ray's own of a cluster's file."""

import copy
import os
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.errors import ClusterRequestError
from cluster.local import LocalCluster, LocalOptions, supervisor
from cluster.local.services import Program
from cluster.render import aws, kuberay
from cluster.request import ClusterRequest
from orchestrator.cli.app import run
from orchestrator.experiments.load import load_experiment
from orchestrator.launch.machines import MachineOptions, request_of
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
PLACE = aws.AwsOptions(region="eu-west-1", instance_profile="trainer")
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
def spec_schema() -> jsonschema.protocols.Validator:
    path = CRDS / "ray.io_rayjobs.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}")
    versions = {v["name"]: v for v in yaml.safe_load(path.read_text())["spec"]["versions"]}
    schema = strict(versions["v1"]["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return jsonschema.validators.validator_for(schema)(schema)  # `jsonschema.validate` would check the schema each time


def pod_schema(spec_schema: jsonschema.protocols.Validator) -> jsonschema.protocols.Validator:
    cluster = spec_schema.schema["properties"]["rayClusterSpec"]["properties"]
    return spec_schema.evolve(schema=cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"])


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_what_kuberay_takes(spec_schema: jsonschema.protocols.Validator, kind: str):
    made = documents(kuberay.render_job(KINDS[kind]))
    spec_schema.validate(made["RayJob"]["spec"])
    assert len(made["RayJob"]["metadata"]["name"]) <= 47
    broken = copy.deepcopy(made["RayJob"]["spec"])
    broken["rayClusterSpec"]["headGroupSpec"]["rayStartParms"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParms"):
        spec_schema.validate(broken)


def test_the_mlflow_servers_pod_is_one(spec_schema: jsonschema.protocols.Validator):
    made = documents(kuberay.render_mlflow(PLAIN))
    pod = made["Deployment"]["spec"]["template"]["spec"]
    pod_schema(spec_schema).validate(pod)
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
    text = aws.render(KINDS[kind], PLACE)
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
    place = ["--region", "eu-west-1", "--instance-profile", "trainer", "--worker-type", "m7i.xlarge"]
    assert run(["cluster", "render", "aws", *name, "--output", str(tmp_path), *place]) == 0, capsys.readouterr().err
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
    others = [text for text in EXPERIMENT if not text.startswith(key)]
    loaded = load_experiment("anchor_ntxent_caltech", [*others, f"{key}=here"])
    with pytest.raises(ConfigError, match=f"{key}: .*here is a folder of this machine"):
        request_of(loaded, MachineOptions())


def test_a_password_in_the_tracking_address_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example")
    with pytest.raises(ConfigError, match="contains a password"):
        request_of(load_experiment("anchor_ntxent_caltech", EXPERIMENT), MachineOptions())


HOSTILE = (
    "$(touch x)",
    "`touch x`",
    "a; touch x",
    "a & touch x",
    "it's",
    '"',
    "\\",
    "a\nb: c",
    "$HOME",
    "%(here)s",
    " #",
    "- [",
    "é\x85",
)
texts = st.one_of(
    st.sampled_from(HOSTILE), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
)


@settings(max_examples=25, deadline=None)
@given(uri=texts, value=texts, name=texts, experiment=texts)
def test_no_value_of_a_user_becomes_a_command_or_another_value(uri: str, value: str, name: str, experiment: str):
    """Ray's start commands run in a shell, with stand-ins for `chmod` and `ray`; Kubernetes' rules of expansion are undone."""
    request = replace(
        PLAIN, tracking_uri=f"http://{uri}", environment={"A_VALUE": value}, name=name, experiment_yaml=experiment
    )
    expected = {"MLFLOW_TRACKING_URI": f"http://{uri}", "A_VALUE": value}
    config = yaml.safe_load(aws.render(request, PLACE))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chmod").write_text("#!/bin/sh\n")
        Path(folder, "ray").write_text("#!/bin/sh\nexec /usr/bin/env -0\n")
        for stand_in in Path(folder).iterdir():
            stand_in.chmod(0o755)
        for who in ("head", "worker"):
            done = subprocess.run(
                ["/bin/bash", "-c", config[f"{who}_start_ray_commands"][1]],
                cwd=folder,
                env={"PATH": folder},
                capture_output=True,
                check=True,
            )
            variables = dict(item.split("=", 1) for item in os.fsdecode(done.stdout).split("\0") if item)
            assert {key: variables[key] for key in expected} == expected
        assert {path.name for path in Path(folder).iterdir()} == {"chmod", "ray"}
    made = documents(kuberay.render_job(request))
    assert made["ConfigMap"]["data"]["experiment.yaml"] == experiment
    for pod in pods_of(kuberay.render_job(request)):
        for variable in [v for container in pod["containers"] for v in container.get("env", [])]:
            text = variable["value"]
            assert text.count("$") % 2 == 0 and text.replace("$$", "") == text.replace("$", "")
            assert text.replace("$$", "$") == expected.get(variable["name"], text)


@settings(max_examples=40, deadline=None)
@given(folder=texts, value=texts)
def test_supervisord_reads_every_value_as_it_was_given_or_it_is_refused(folder: str, value: str):
    from supervisor.options import ServerOptions

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, f"x{folder.replace('/', '_')}")
        cluster = LocalCluster(id="0", folder=str(place), scratch=scratch, created=0, boot=0, options=LocalOptions())
        cluster.logs.mkdir(parents=True)
        program = Program(name="one", command=["/bin/true", value, cluster.folder], environment={"A_VALUE": value})
        try:
            text = supervisor.configuration(cluster, [program])
        except ClusterRequestError:
            return
        path = Path(scratch, "supervisord.conf")
        path.write_text(text, encoding="utf-8")
        options = ServerOptions()
        options.realize(["-c", str(path)])
        (process,) = options.process_group_configs[0].process_configs
        assert process.environment["A_VALUE"] == value
        assert shlex.split(process.command) == ["/bin/true", value, cluster.folder]


@pytest.mark.parametrize(
    "changed",
    [
        {"region": "eu-west-1; touch x"},
        {"instance_profile": "a b"},
        {"worker_type": "g5.2xlarge\nprovider: {}"},
        {"head_type": "$(id)"},
    ],
)
def test_what_is_no_name_of_aws_is_refused(changed: dict[str, str]):
    with pytest.raises(ClusterRequestError, match="expected letters, digits"):
        aws.AwsOptions(**{"region": "eu-west-1", "instance_profile": "trainer", **changed})


def test_an_image_or_variable_that_a_shell_would_read_is_refused():
    for changed in (
        {"image": "x; touch y"},
        {"image": "$(id)"},
        {"environment": {"A B": "c"}},
        {"command": "train; id"},
    ):
        with pytest.raises(ClusterRequestError, match="expected letters, digits"):
            replace(PLAIN, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["---", "2024-run", "Ünïcode", "a" * 60 + "-", "x\ny: z"])
def test_names_of_objects_are_dns_labels(name: str):
    import re

    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", replace(PLAIN, name=name).object_name)
