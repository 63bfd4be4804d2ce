"""`orchestrator discover`: object discovery over a dataset on Ray Data's actors, recorded in MLflow.

Each actor takes parts of the dataset; a part's file is whole or absent. An actor that dies is replaced and its part done again;
a command that dies is given again and goes on with the parts that are missing.
"""

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.discovery.actors import Progress, work
from orchestrator.discovery.spec import DiscoverExperiment
from orchestrator.runs.records import MetricsRecord
from orchestrator.storage.locks import hold
from orchestrator.tracking.addresses import run_address
from orchestrator.tracking.client import quiet_mlflow
from orchestrator.tracking.header import DatasetUse, RunHeader, header_of, prefixed
from orchestrator.tracking.sink import MlflowSink
from workloads.config import flatten
from workloads.errors import ConfigError
from workloads.loops.discovery.finish import finish
from workloads.loops.discovery.job import Job, finished_record, prepare


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryOutcome:
    """Where a discovery is recorded, and what it found."""

    run_id: str
    address: str
    output: str
    figures: Mapping[str, float]


def discover(experiment: DiscoverExperiment, *, progress: Progress, debug: bool = False) -> DiscoveryOutcome:
    """Find boxes, measure them where objects are known, and record both; a finished discovery is only read again.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        DiscoveryError: it began and could not be completed; the same command continues it.
    """
    uri = tracking_uri(experiment)
    job = prepare(experiment.science, experiment.output)
    quiet_mlflow()
    with (
        hold(experiment.output, what="discovering into this folder") as lock,
        tempfile.TemporaryDirectory() as pictures,
    ):
        root = None if "://" in experiment.output else Path(experiment.output, "mlartifacts").as_uri()
        filesystem, _ = job.state
        sink = MlflowSink(
            _header_of(experiment, job),
            uri=uri,
            artifact_root=root if uri.startswith("sqlite:") else None,
            filesystem=filesystem,
            run_folder=experiment.output,
        )
        earlier = finished_record(experiment.output)
        if earlier is not None:
            progress(job.num_images, job.num_images)
            return _outcome(experiment, sink, uri, earlier["figures"])
        run_id = sink.open()
        try:
            timings = work(experiment, job, progress=progress, debug=debug)
            lock.check()
            figures = finish(job, Path(pictures), timings=timings).figures
            now = int(time.time() * 1000)
            sink.write([MetricsRecord(step=0, time_ms=now, metrics=figures)])
            for folder in sorted(Path(pictures).iterdir()):
                sink.log_folder(folder, folder.name)
        except BaseException as error:
            sink.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        sink.close("FINISHED")
        assert sink.experiment_id is not None
        address = run_address(uri, sink.experiment_id, run_id)
        return DiscoveryOutcome(run_id=run_id, address=address, output=experiment.output, figures=figures)


def _outcome(
    experiment: DiscoverExperiment, sink: MlflowSink, uri: str, figures: Mapping[str, float]
) -> DiscoveryOutcome:
    run_id = sink.open()
    sink.close("FINISHED")
    assert sink.experiment_id is not None
    address = run_address(uri, sink.experiment_id, run_id)
    return DiscoveryOutcome(run_id=run_id, address=address, output=experiment.output, figures=figures)


def tracking_uri(experiment: DiscoverExperiment) -> str:
    """The configured tracking URI, else MLFLOW_TRACKING_URI, else SQLite beside the (local) output folder.

    Raises:
        ConfigError: the output is not local and no tracking URI is given.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "://" in experiment.output:
        raise ConfigError(f"tracking.uri: needed, because {experiment.output} cannot hold an SQLite file")
    folder = Path(experiment.output).parent
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


def _header_of(experiment: DiscoverExperiment, job: Job) -> RunHeader:
    return header_of(
        experiment.tracking.run_name or f"discover-{experiment.methods[0]}-{job.identity[:8]}",
        experiment.science,
        claim=hashlib.sha256(f"{job.identity} {experiment.output}".encode()).hexdigest()[:32],
        experiment=experiment.tracking.experiment,
        command="discover",
        config_sha256=job.identity,
        manifest_sha256=job.manifest_sha256,
        params={**flatten(experiment.science), **prefixed("scaling", flatten(experiment.scaling))},
        tags={},
        datasets=[DatasetUse(context="discovery", uri=experiment.uri, sha256=job.manifest_sha256)],
    )


def table(figures: Mapping[str, float], methods: Sequence[str]) -> list[str]:
    """Lines of a table: CorLoc and class-agnostic AP50 of each method with 95 % intervals, and the gain over the centre box."""
    lines = [f"{'method':<14} {'CorLoc':>8}  {'95 %':<14} {'− centre, paired':<22} {'AP50':>7}  {'95 %':<12}"]
    for method in methods:
        mine = {k.removeprefix(f"eval/{method}/"): v for k, v in figures.items() if k.startswith(f"eval/{method}/")}
        if "corloc" not in mine:
            continue
        percent = {name: 100 * value for name, value in mine.items()}
        between = f"[{percent['corloc_low']:.1f}, {percent['corloc_high']:.1f}]"
        gain = ""
        if "gain_over_centre" in percent:
            low, high = percent["gain_over_centre_low"], percent["gain_over_centre_high"]
            gain = f"{percent['gain_over_centre']:+.1f} [{low:+.1f}, {high:+.1f}]"
        ap = (
            f"{percent['ap50']:7.2f}  [{percent['ap50_low']:.2f}, {percent['ap50_high']:.2f}]"
            if "ap50" in percent
            else ""
        )
        lines.append(f"{method:<14} {percent['corloc']:6.1f} %  {between:<14} {gain:<22} {ap}")
    return lines if len(lines) > 1 else ["no image has a known object, so nothing was measured"]
