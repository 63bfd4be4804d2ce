"""Ray actors that each discover the objects of one part of a dataset."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from orchestrator.discovery.spec import DiscoverExperiment
from orchestrator.ray_support.errors import sentence
from orchestrator.ray_support.session import connect
from workloads.loops.discovery.finish import DiscoveryError
from workloads.loops.discovery.job import Job
from workloads.loops.discovery.worker import PartWorker

Progress = Callable[[int, int], None]
"""Told (images done, images in all)."""


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
    scaling = experiment.scaling
    os.environ["RAY_worker_niceness"] = str(scaling.niceness)  # noqa: SIM112 - Ray's spelling
    # One CPU more, so that Ray Data's own tasks never wait for actors.
    connect(os.environ.get("RAY_ADDRESS"), cpus=scaling.num_workers * scaling.cpus_per_worker + 1, debug=debug)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows images, Ray would show blocks
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
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


def _cause(error: BaseException) -> str:
    """The exception that an actor raised, in one line: Ray wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return sentence(error)[:400]
