"""`orchestrator discover`: object discovery over a dataset on Ray Data's actors, recorded in MLflow.

Each actor takes parts of the dataset; a part's file is whole or absent. An actor that dies is replaced and its part done again;
a command that dies is given again and goes on with the parts that are missing.
"""

import dataclasses
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from orchestrator.experiments.load import absolute_uri
from orchestrator.ray_support import credentials
from orchestrator.ray_support.session import join, on_cluster
from orchestrator.storage.locks import hold
from orchestrator.tracking.sink import (
    CLAIM_TAG,
    MlflowSink,
    RunHeader,
    dataset_label,
    git_tags,
    quiet_mlflow,
    run_address,
    shown_params,
    without_secrets,
)
from workloads.config import ConfigError, apply_overrides, build, config, flatten, parse_overrides, read_yaml, to_yaml
from workloads.loops.discovery.finish import DiscoveryError, finish
from workloads.loops.discovery.job import DiscoverConfig, Job, MatchConfig, finished_record, prepare
from workloads.loops.discovery.worker import PartWorker
from workloads.models.trunks import CheckpointTrunkConfig, SupervisedTrunkConfig, VitTrunkConfig

Progress = Callable[[int, int], None]
"""Told (images done, images in all)."""


@config
class ActorsConfig:
    """How many actors look at images, and what each of them gets."""

    num_workers: PositiveInt = 1
    """Actors, each with networks of its own."""
    cpus_per_worker: PositiveInt = 1
    """Ray CPUs that each actor holds, and its torch threads."""
    use_gpu: bool = False
    """Give each actor one GPU."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Nice level of the actors. Ray's own default, 15, makes them yield to anything else on the machine."""


@config
class RecordConfig:
    """Where the record of the discovery is kept."""

    uri: str | None = None
    """MLflow tracking URI; null: the MLFLOW_TRACKING_URI variable, else SQLite beside the output folder."""
    experiment: str = "discovery"
    """MLflow experiment that the run is listed under."""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """Name of the run; null: the first method's, and the beginning of the request's hash."""


@config
class DiscoverExperiment(DiscoverConfig):
    """A discovery, and where and how it runs."""

    output: str = "runs/discovery"
    """Where boxes, figures and the parts on their way go: a folder that all nodes share, or s3://bucket/prefix."""
    scaling: ActorsConfig = ActorsConfig()
    tracking: RecordConfig = RecordConfig()

    @property
    def science(self) -> DiscoverConfig:
        """The part that decides the boxes and their figures."""
        return DiscoverConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DiscoverConfig)})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryOutcome:
    """Where a discovery is recorded, and what it found."""

    run_id: str
    address: str
    output: str
    figures: Mapping[str, float]


def load_discovery(arguments: Sequence[str]) -> DiscoverExperiment:
    """A YAML file, if the first argument is one, and dotted overrides; local paths made absolute.

    Raises:
        ConfigError: one sentence with the dotted key and how to mend it.
    """
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: expected key=value, after one YAML file at most")
    data = read_yaml(files[0]) if files else {}
    data = apply_overrides(data, parse_overrides([argument for argument in arguments if "=" in argument]))
    if "uri" not in data:
        raise ConfigError("uri: name the dataset to look at, as uri=FOLDER")
    found = build(DiscoverExperiment, data)
    changes: dict[str, Any] = {"uri": absolute_uri(found.uri), "output": absolute_uri(found.output)}
    for name in ("file", "detector"):
        if (path := getattr(found, name)) is not None:
            changes[name] = absolute_uri(path)
    if found.match.boxes is not None and found.match.uri is not None:
        changes["match"] = MatchConfig(boxes=absolute_uri(found.match.boxes), uri=absolute_uri(found.match.uri))
    match found.trunk:
        case SupervisedTrunkConfig(file=str(file)):
            changes["trunk"] = dataclasses.replace(found.trunk, file=absolute_uri(file))
        case CheckpointTrunkConfig(uri=uri):
            changes["trunk"] = dataclasses.replace(found.trunk, uri=absolute_uri(uri))
        case VitTrunkConfig(vit=vit) if vit.weights not in ("none", "timm"):
            vit = dataclasses.replace(vit, weights=absolute_uri(vit.weights))
            changes["trunk"] = dataclasses.replace(found.trunk, vit=vit)
    return dataclasses.replace(found, **changes)


def discover(experiment: DiscoverExperiment, *, progress: Progress, debug: bool = False) -> DiscoveryOutcome:
    """Find boxes, measure them where objects are known, and record both; a finished discovery is only read again.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        DiscoveryError: it began and could not be completed; the same command continues it.
    """
    uri = tracking_uri(experiment)
    job = prepare(experiment.science, experiment.output)
    quiet_mlflow()
    with hold(experiment.output, what="discovering into this folder"), tempfile.TemporaryDirectory() as pictures:
        root = None if "://" in experiment.output else Path(experiment.output, "mlartifacts").as_uri()
        filesystem, _ = job.state
        sink = MlflowSink(
            run_header(experiment, job),
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
            figures = finish(job, Path(pictures), timings=timings).figures
            now = int(time.time() * 1000)
            sink.write([{"kind": "metrics", "step": 0, "time_ms": now, "metrics": dict(figures)}])
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


def run_header(experiment: DiscoverExperiment, job: Job) -> RunHeader:
    """Parameters, tags, dataset and config of a discovery's run."""
    claim = hashlib.sha256(f"{job.identity} {experiment.output}".encode()).hexdigest()[:32]
    scaling = {f"scaling.{key}": value for key, value in flatten(experiment.scaling).items()}
    kind = "s3" if experiment.uri.startswith("s3://") else "local"
    return RunHeader(
        name=experiment.tracking.run_name or f"discover-{experiment.methods[0]}-{job.identity[:8]}",
        claim=claim,
        experiment=experiment.tracking.experiment,
        params=shown_params({**flatten(experiment.science), **scaling}),
        tags={
            CLAIM_TAG: claim,
            "config.sha256": job.identity,
            "data.manifest_sha256": job.manifest_sha256,
            "mlflow.source.name": "orchestrator discover",
            "mlflow.source.type": "JOB",
            **git_tags(),
        },
        datasets=[("discovery", dataset_label(experiment.uri), job.manifest_sha256[:36], kind)],
        config_yaml=without_secrets(to_yaml(experiment.science)),
    )


class PartActor:
    """Ray Data's view of a worker: made once in each actor, then called with the numbers of parts."""

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        from workloads.parallel.runtime import pick_device

        torch.set_num_threads(threads)
        self._worker = PartWorker(job, device=pick_device())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        images = self._worker.run(int(row["part"]))
        return {"images": images, "began": began, "ended": time.time()}


def work(experiment: DiscoverExperiment, job: Job, *, progress: Progress, debug: bool = False) -> dict[str, float]:
    """Have the missing parts done by Ray Data's actors; returns how fast it went.

    Raises:
        DiscoveryError: a part cannot be done.
    """
    missing = job.missing()
    if not missing:
        return {}
    start_ray(experiment, debug=debug)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows images, Ray would show blocks
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    scaling = experiment.scaling
    actors = min(scaling.num_workers, len(missing))
    done = job.num_images - sum(job.images_in(part) for part in missing)
    began, spans = time.time(), []
    progress(done, job.num_images)
    parts = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
    results = parts.map(
        PartActor,  # type: ignore[arg-type]  # Ray's hint knows functions only
        fn_constructor_args=(job, scaling.cpus_per_worker),
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else 0,
    )
    try:
        for row in results.iter_rows():
            done += row["images"]
            spans.append((row["began"], row["ended"], row["images"]))
            progress(done, job.num_images)
    except Exception as error:
        raise DiscoveryError(f"{_cause(error)}; {len(job.missing())} of {job.num_parts} parts are missing") from error
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    images = sum(span[2] for span in spans)
    return {
        "discover/images_per_s": images / max(last - first, 1e-9),
        "discover/startup_s": first - began,
        "discover/actors": float(actors),
    }


def start_ray(experiment: DiscoverExperiment, *, debug: bool) -> None:
    """Join the cluster of RAY_ADDRESS, else start a Ray inside this process, large enough for the actors."""
    import ray

    if ray.is_initialized():
        return
    scaling = experiment.scaling
    os.environ |= {"RAY_worker_niceness": str(scaling.niceness)}
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    variables = credentials.gather(os.environ, s3=True)
    if on_cluster():
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        join(os.environ["RAY_ADDRESS"], variables, **options)
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    # Logical CPUs: a machine with fewer still runs, slower. One more, so that Ray Data's own tasks never wait for actors.
    wanted = scaling.num_workers * scaling.cpus_per_worker + 1
    join("local", variables, num_cpus=max(wanted, os.cpu_count() or 1), include_dashboard=False, **options)


def _cause(error: BaseException) -> str:
    """What an actor raised, in one line: Ray wraps it several times, and puts the traceback into the text."""
    text = ""
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split()) or text
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return text.rpartition("Error: ")[2][:400] or type(error).__name__


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
