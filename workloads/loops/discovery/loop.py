"""Runs a discovery on this process, or on all of torchrun's (`discover`); the orchestrator runs the same parts on Ray's actors."""

import time

from workloads.loops.discovery.finish import finish
from workloads.loops.discovery.job import DiscoverConfig, finished_record, prepare
from workloads.loops.discovery.worker import PartWorker
from workloads.parallel.distributed import from_rank_0, wait_for_all
from workloads.parallel.runtime import Runtime, new_folder


def discover(settings: DiscoverConfig, runtime: Runtime, output: str) -> dict[str, float]:
    """Find boxes in a dataset, write them to `output` and report the figures, which rank 0 returns.

    After a kill, the same call continues with the parts that are missing; after the end, it returns the stored figures.

    Raises:
        DataError: there is no dataset, or a shard cannot be read.
        ConfigError: the weights cannot be used, or `output` holds another discovery.
    """
    job = prepare(settings, output)
    earlier = finished_record(output)
    if earlier is not None:
        return dict(earlier["figures"])
    # Listed once: a rank that lists later sees fewer missing parts, and would take another share of them.
    missing = from_rank_0(job.missing())
    began, done = time.perf_counter(), 0
    if missing:
        worker = PartWorker(job, device=runtime.device)
        for part in missing[runtime.rank :: runtime.world_size]:
            done += worker.run(part)
            speed = done / (time.perf_counter() - began)
            runtime.progress({"images/s": speed}, step=10 * (part + 1), total_steps=10 * job.num_parts)
    wait_for_all()
    figures: dict[str, float] = {}
    if runtime.rank == 0:
        folder = new_folder()
        figures = dict(finish(job, folder).figures)
        runtime.report(figures, step=0, artifacts=folder)
    return figures
