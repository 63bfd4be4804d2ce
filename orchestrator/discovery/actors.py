"""Runs the parts of a discovery on Ray Data's actors (`work`, `PartActor`)."""

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

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""


class PartActor:
    """Calls `PartWorker` for Ray Data: created once in each actor, then called with the number of one part after the other.

    A fault is returned, because of a raised one Ray Data passes on only the text of the traceback.
    """

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        from workloads.parallel.runtime import pick_device

        torch.set_num_threads(threads)
        self._worker: PartWorker | None = None
        self._fault = ""
        try:
            self._worker = PartWorker(job, device=pick_device())
        except Exception as error:
            self._fault = _logged(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do the part `row["part"]`."""
        began, images = time.time(), 0
        if self._worker is not None:
            try:
                images = self._worker.run(int(row["part"]))
            except Exception as error:
                self._fault = _logged(error)
        return {"images": images, "began": began, "ended": time.time(), "fault": self._fault}


def _logged(error: Exception) -> str:
    logger.error("a part failed", exc_info=error)  # shown with --debug
    return sentence(error)


def start_ray(experiment: DiscoverExperiment, *, debug: bool) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local Ray that has room for the actors."""
    scaling = experiment.scaling
    os.environ["RAY_worker_niceness"] = str(scaling.niceness)  # noqa: SIM112 - Ray's spelling
    # One CPU more, so that Ray Data's own tasks never wait for actors.
    connect(os.environ.get("RAY_ADDRESS"), cpus=scaling.num_workers * scaling.cpus_per_worker + 1, debug=debug)


def work(experiment: DiscoverExperiment, job: Job, *, progress: Progress, debug: bool = False) -> dict[str, float]:
    """Do the missing parts on actors of the Ray that is connected; returns speed, start time and number of actors by MLflow key.

    Raises:
        DiscoveryError: a part cannot be done.
    """
    missing = job.missing()
    if not missing:
        return {}
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
            if row["fault"]:
                raise DiscoveryError(f"{row['fault']}; {_missing(job)}")
            done += row["images"]
            spans.append((row["began"], row["ended"], row["images"]))
            progress(done, job.num_images)
    except DiscoveryError:
        raise
    except Exception as error:  # an actor died, and so did those that replaced it
        raise DiscoveryError(f"{sentence(error)}; {_missing(job)}") from error
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    images = sum(span[2] for span in spans)
    return {
        "discover/images_per_s": images / max(last - first, 1e-9),
        "discover/startup_s": first - began,
        "discover/actors": float(actors),
    }


def _missing(job: Job) -> str:
    return f"{len(job.missing())} of {job.num_parts} parts are missing; the same command continues"
