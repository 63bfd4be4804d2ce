"""`orchestrator cluster render`: the files that bring up, elsewhere, the machines that an experiment asks for."""

import math
import os
from importlib.metadata import version
from pathlib import Path

from cluster.request import ClusterRequest
from orchestrator.experiments.spec import AnyExperiment, command_of, places_read
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.launch.plan import plan_run
from orchestrator.ray_support.credentials import divide
from orchestrator.ray_support.spare_processes import importing
from orchestrator.runs.identity import run_name
from orchestrator.sweeps.run import sweep_name
from orchestrator.tracking.addresses import is_server, without_secrets
from workloads.config import to_yaml
from workloads.errors import ConfigError

_GIB_PER_CPU, _LEAST_GIB = 2, 6
_ROOM = 1.5  # over what was measured: Ray's own processes, the object store, fragmentation


def request_of(
    experiment: AnyExperiment, *, image: str, memory_gib: int | None, measure: bool, spot: bool, retries: int
) -> ClusterRequest:
    """What `experiment` asks of machines that are not here.

    Args:
        memory_gib: of each worker; None: measured by the plan's few steps if `measure`, else a rule of thumb.

    Raises:
        ConfigError: it names places that only this machine has.
        CalibrationError: the few steps did not end.
    """
    for key, uri in {**places_read(experiment), "storage.path": experiment.storage.path}.items():
        if "://" not in uri:
            raise ConfigError(f"{key}: {uri} is a place of this machine; the cluster's nodes need s3://bucket/prefix")
    scaling = experiment.scaling
    if memory_gib is None:
        memory_gib = max(_LEAST_GIB, _GIB_PER_CPU * scaling.cpus_per_worker)
        if measure:
            measured = plan_run(experiment, calibrate=True, price=None).calibration
            assert measured is not None
            memory_gib = max(2, math.ceil(_ROOM * measured.peak_bytes / 2**30))
    told = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    server = told if told and is_server(told) else None
    if server is not None and server != without_secrets(server):
        raise ConfigError(
            "tracking.uri: it holds a password, which a file must not; give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD by the Secret"
        )
    is_sweep = isinstance(experiment, SweepExperiment)
    at_once = (experiment.sweep.max_concurrent or 1) if isinstance(experiment, SweepExperiment) else 1
    seen, _ = divide({k: v for k, v in os.environ.items() if k in ("AWS_ENDPOINT_URL", "AWS_REGION")})
    return ClusterRequest(
        name=sweep_name(experiment) if isinstance(experiment, SweepExperiment) else run_name(experiment),
        experiment_yaml=without_secrets(to_yaml(experiment)),
        command="sweep" if is_sweep else command_of(experiment),
        image=image,
        ray_version=version("ray"),
        fewest_workers=scaling.fewest_workers * at_once,
        most_workers=scaling.most_workers * at_once,
        cpus_per_worker=scaling.cpus_per_worker,
        memory_gib=memory_gib,
        gpus_per_worker=int(scaling.use_gpu),
        tracking_uri=server,
        environment={**importing(), "RAY_worker_niceness": str(scaling.niceness), **seen},
        spot=spot,
        retries=retries,
    )


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write each file; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    return paths
