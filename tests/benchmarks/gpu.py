"""Measures training steps of several models on one GPU (or, to try it, a CPU) and prints JSON; needs no Ray.

    python tests/benchmarks/gpu.py --models compare_ntxent compare_detco [--data SHARDS] [--steps 30] [--json FILE] [key=value …]

A model is the name of an experiment file; `key=value` overrides keys of all of them, as global_batch_size=256 precision=bf16.
For each model:

    images_per_s    the whole step: batch (read and decoded with --data, else ready on the host), upload, views, update
    share_of_limit  of the rate of the same model, batch and precision on views that are already on the device
    syncs_per_step  how often a step waits for the device (torch.cuda.set_sync_debug_mode); null on a CPU
    peak_gib        largest GPU memory that tensors held; on a CPU, largest resident memory of the process
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.objectives import EXPERIMENTS, batch_of
from tests.benchmarks.process_memory import peak_mib
from workloads.config import apply_overrides, build, parse_overrides, read_yaml
from workloads.data.loading.loaders import TrainLoader
from workloads.data.loading.sample_plan import SamplePlan
from workloads.data.loading.upload import Upload
from workloads.data.store.manifest import open_dataset
from workloads.loops.pretrain import _update
from workloads.parallel.runtime import pick_device
from workloads.spec.factory import build_objective, render_views
from workloads.spec.optim import make_optimizer
from workloads.spec.pretrain import ORCHESTRATOR_SECTIONS, PretrainConfig
from workloads.types import ImageBatch

_WARM_UP = 3


def settings_of(model: str, overrides: dict[str, Any]) -> PretrainConfig:
    """The experiment file `model`, trained only."""
    data = read_yaml(next(EXPERIMENTS.glob(f"*/{model}.yaml")))
    kept = {key: value for key, value in data.items() if key not in (*ORCHESTRATOR_SECTIONS, "evaluation")}
    return build(PretrainConfig, apply_overrides(kept, overrides))


def batches_of(settings: PretrainConfig, data: str | None) -> Iterator[ImageBatch]:
    """Batches on the host without end, from shards or one that is repeated."""
    if data is None:
        yield from itertools.repeat(batch_of(settings.global_batch_size, settings.data.decode_size or 256))
    dataset = open_dataset(str(data))
    plan = SamplePlan(
        dataset.row_groups.rows,
        dataset_sha256=dataset.manifest.sha256,
        seed=settings.seed,
        global_batch_size=settings.global_batch_size,
        lanes=settings.data.lanes,
    )
    loader = TrainLoader(dataset, plan, settings.data, rank=0, world_size=1, regions=settings.views.regions_column)
    yield from loader.iterate(start_step=0)


def rate_of(step: Callable[[int], object], steps: int, images: int, device: torch.device) -> float:
    """Images/s over `steps` calls, after a warm-up."""
    for number in range(_WARM_UP):
        step(number)
    _wait(device)
    began = time.perf_counter()
    for number in range(steps):
        step(_WARM_UP + number)
    _wait(device)
    return steps * images / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def syncs_of(step: Callable[[int], object], steps: int, device: torch.device) -> float | None:
    """How often a step makes the host wait for the device."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(steps):
                step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught) / steps


def measure(settings: PretrainConfig, data: str | None, steps: int, device: torch.device) -> dict[str, float | None]:
    """The four figures of one model."""
    torch.manual_seed(settings.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    objective = build_objective(settings).train()
    if settings.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    objective = objective.to(device)
    optimizer = make_optimizer(objective, settings.optimizer)
    upload, batches = Upload(device), batches_of(settings, data)
    views = render_views(upload(next(batches)), settings)

    def whole(step: int) -> None:
        _update(objective, objective, optimizer, upload(next(batches)), settings, device)
        objective.after_update(step, 1000)

    def model_alone(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = objective(views).loss
        loss.backward()
        optimizer.step()
        objective.after_update(step, 1000)

    size = settings.global_batch_size
    limit, rate = (rate_of(step, steps, size, device) for step in (model_alone, whole))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_mib() / 2**10
    return {
        "images_per_s": rate,
        "share_of_limit": rate / limit,
        "syncs_per_step": syncs_of(whole, min(steps, 5), device),
        "peak_gib": peak,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="names of experiment files, as compare_ntxent")
    parser.add_argument("--data", help="shards of data build; without, one batch on the host is repeated")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options, others = parser.parse_known_args(arguments)
    overrides = [*others, *(name for name in options.models if "=" in name)]
    if unknown := [other for other in others if other.startswith("-") or "=" not in other]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {"data.uri": options.data or "none", **parse_overrides(overrides)}
    device = pick_device()
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "models": {
            name: measure(settings_of(name, given), options.data, options.steps, device)
            for name in options.models
            if "=" not in name
        },
    }
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return result


if __name__ == "__main__":
    main()
