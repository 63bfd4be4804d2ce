"""Derives the machines that an experiment needs (`request_of`), renders files that start them elsewhere, and writes the files."""

import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cluster.render import aws, kuberay
from cluster.request import ClusterRequest
from orchestrator.experiments.spec import AnyExperiment, command_of, places_read
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.plan import plan_run
from orchestrator.ray_support.credentials import divide
from orchestrator.ray_support.spare_processes import importing
from orchestrator.runs.identity import run_name
from orchestrator.sweeps.run import sweep_name
from orchestrator.tracking.addresses import is_server, without_secrets
from orchestrator.training import PRELOAD
from workloads.config import to_yaml
from workloads.errors import ConfigError

_GIB_PER_CPU, _LEAST_GIB = 2, 6
_ROOM = 1.5  # over what was measured: Ray's own processes, the object store, fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """What an experiment does not say about its machines."""

    image: str = "orchestrator:0.1.0"
    """Container image with this package."""
    memory_gib: int | None = None
    """Memory of each worker, GiB; None: measured if `measure`, else two for each CPU and at least six."""
    measure: bool = False
    """Measure the memory in a few steps on this machine."""
    spot: bool = True
    """Use workers that the provider may take away."""
    retries: int = 3
    """How often KubeRay starts a failed job again."""


def request_of(experiment: AnyExperiment, options: MachineOptions) -> ClusterRequest:
    """The machines that `experiment` needs, and what they run.

    Raises:
        ConfigError: the experiment names places that only this machine has.
        ClusterRequestError: an option cannot be passed on safely.
        CalibrationError: the measured steps failed.
    """
    for key, uri in {**places_read(experiment), "storage.path": experiment.storage.path}.items():
        if "://" not in uri:
            raise ConfigError(f"{key}: {uri} is a folder of this machine; the cluster's nodes need s3://bucket/prefix")
    scaling = experiment.scaling
    at_once, name, command = 1, "", command_of(experiment)
    if isinstance(experiment, SweepExperiment):
        at_once, name, command = experiment.sweep.max_concurrent or 1, sweep_name(experiment), "sweep"
    visible, _ = divide({k: v for k, v in os.environ.items() if k in ("AWS_ENDPOINT_URL", "AWS_REGION")})
    return ClusterRequest(
        name=name or run_name(experiment),
        experiment_yaml=without_secrets(to_yaml(experiment)),
        command=command,
        image=options.image,
        ray_version=version("ray"),
        fewest_workers=scaling.fewest_workers * at_once,
        most_workers=scaling.most_workers * at_once,
        cpus_per_worker=scaling.cpus_per_worker,
        memory_gib=options.memory_gib or _memory_gib(experiment, measure=options.measure),
        gpus_per_worker=int(scaling.use_gpu),
        tracking_uri=_tracking_server(experiment),
        environment={**importing(PRELOAD), "RAY_worker_niceness": str(scaling.niceness), **visible},
        spot=options.spot,
        retries=options.retries,
    )


def _memory_gib(experiment: AnyExperiment, *, measure: bool) -> int:
    if not measure:
        return max(_LEAST_GIB, _GIB_PER_CPU * experiment.scaling.cpus_per_worker)
    measured = plan_run(experiment, calibrate=True, price=None).calibration
    assert measured is not None
    return max(2, math.ceil(_ROOM * measured.peak_bytes / 2**30))


def _tracking_server(experiment: AnyExperiment) -> str | None:
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or not is_server(uri):
        return None
    if uri != without_secrets(uri):
        raise ConfigError(
            "tracking.uri: it contains a password, which must not be in a file; put MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD into the Secret"
        )
    return uri


def render_kuberay(request: ClusterRequest) -> dict[str, str]:
    """File name → text of the manifests for KubeRay; an MLflow server is among them if the run has none."""
    files = {"rayjob.yaml": kuberay.render_job(request)}
    if request.tracking_uri is None:
        files["mlflow.yaml"] = kuberay.render_mlflow(request)
    return files


def render_aws(request: ClusterRequest, *, region: str, instance_profile: str, worker_type: str) -> dict[str, str]:
    """File name → text of the file for `ray up` on AWS.

    Raises:
        ConfigError: there is no MLflow server that the machines can reach.
        ClusterRequestError: an option is not a name of AWS.
    """
    options = aws.AwsOptions(region=region, instance_profile=instance_profile, worker_type=worker_type)
    if request.tracking_uri is None:
        raise ConfigError(
            "tracking.uri: give an MLflow server that the machines can reach, or set MLFLOW_TRACKING_URI to one"
        )
    return {"aws.yaml": aws.render(request, options)}


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write each file into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    return paths
