"""Runs `orchestrator discover` (`discover`): finds boxes on Ray Data's actors and records the discovery in MLflow.

Each actor works on parts of the dataset, and the file of a part is complete or absent. The parts of an actor that dies are
done by another one. A command that was killed or stopped is given again and continues with the parts that are missing.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from orchestrator.discovery.actors import Progress, start_ray, work
from orchestrator.discovery.spec import DiscoverExperiment
from orchestrator.runs.records import MetricsRecord
from orchestrator.storage.lock import Lock
from orchestrator.storage.locks import hold
from orchestrator.tracking.addresses import run_address
from orchestrator.tracking.client import quiet_mlflow
from orchestrator.tracking.header import DatasetUse, RunHeader, header_of, prefixed
from orchestrator.tracking.sink import MlflowSink
from workloads.config import flatten
from workloads.errors import ConfigError, RunStoppedError
from workloads.loops.discovery.finish import finish
from workloads.loops.discovery.job import Job, finished_record, prepare
from workloads.metrics.names import MetricName


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryOutcome:
    """A finished discovery."""

    run_id: str  # in MLflow
    address: str
    output: str  # folder or URI of the boxes
    figures: Mapping[str, float]


def discover(experiment: DiscoverExperiment, *, progress: Progress, debug: bool = False) -> DiscoveryOutcome:
    """Find boxes, measure them where objects are known, and record both; of a finished discovery, only read the record.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        DiscoveryError: a part cannot be done; the same command continues.
        RunStoppedError: the process was terminated; the same command continues.
    """
    uri = tracking_uri(experiment)
    job = prepare(experiment.science, experiment.output)
    quiet_mlflow()
    with hold(experiment.output, what="discovering into this folder") as lock:
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
        run_id = sink.open()
        if earlier is not None:
            progress(job.num_images, job.num_images)
            figures = earlier["figures"]
            _record(sink, figures)  # MLflow may have been away when they were found; what the run has is not sent again
        else:
            figures = _work_and_record(experiment, job, sink, lock, progress=progress, debug=debug)
        sink.close("FINISHED")
        assert sink.experiment_id is not None
        address = run_address(uri, sink.experiment_id, run_id)
        return DiscoveryOutcome(run_id=run_id, address=address, output=experiment.output, figures=figures)


def _work_and_record(
    experiment: DiscoverExperiment, job: Job, sink: MlflowSink, lock: Lock, *, progress: Progress, debug: bool
) -> Mapping[str, float]:
    def end(status: str) -> None:
        # A run whose lock was lost belongs to the process that has it now; and the reason of the end comes first.
        if not lock.lost:
            with contextlib.suppress(Exception):
                sink.close(status)

    try:
        if job.missing():
            start_ray(experiment, debug=debug)
        with tempfile.TemporaryDirectory() as pictures, _sigterm_exits():
            timings = work(experiment, job, progress=progress, debug=debug)
            lock.check()
            figures = finish(job, Path(pictures), timings=timings).figures
            _record(sink, figures)
            for folder in sorted(Path(pictures).iterdir()):
                sink.log_folder(folder, folder.name)
    except (KeyboardInterrupt, SystemExit) as stop:
        end("KILLED")
        if isinstance(stop, KeyboardInterrupt):
            raise
        raise RunStoppedError(
            f"stopped on request (SIGTERM) with {len(job.missing())} of {job.num_parts} parts missing; "
            "give the same command again to continue"
        ) from None
    except BaseException:
        end("FAILED")
        raise
    return figures


def _record(sink: MlflowSink, figures: Mapping[str, float]) -> None:
    sink.write([MetricsRecord(step=0, time_ms=int(time.time() * 1000), metrics=figures)])


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Raise SystemExit on SIGTERM. The handler that Ray has set would end Ray's processes, and with them this one, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tracking_uri(experiment: DiscoverExperiment) -> str:
    """The configured tracking URI, else MLFLOW_TRACKING_URI, else SQLite beside the (local) output folder.

    Raises:
        ConfigError: the output is not local and no tracking URI is given.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "://" in experiment.output:
        raise ConfigError(
            f"tracking.uri: needed, because {experiment.output} cannot hold an SQLite file; or set MLFLOW_TRACKING_URI"
        )
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

        def percent(figure: str, of: str = method) -> float | None:
            value = figures.get(str(MetricName(figure, group=of)))
            return None if value is None else 100 * value

        corloc = percent("corloc")
        if corloc is None:
            continue
        between = f"[{percent('corloc_low'):.1f}, {percent('corloc_high'):.1f}]"
        gain = ap50 = ""
        if (value := percent("gain_over_centre")) is not None:
            gain = f"{value:+.1f} [{percent('gain_over_centre_low'):+.1f}, {percent('gain_over_centre_high'):+.1f}]"
        if (value := percent("ap50")) is not None:
            ap50 = f"{value:7.2f}  [{percent('ap50_low'):.2f}, {percent('ap50_high'):.2f}]"
        lines.append(f"{method:<14} {corloc:6.1f} %  {between:<14} {gain:<22} {ap50}")
    return lines if len(lines) > 1 else ["no image has a known object, so nothing was measured"]
