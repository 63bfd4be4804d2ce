"""Measures the cost of an objective beyond its networks: its step over the forward and backward passes of the networks alone.

    python tests/benchmarks/objectives.py --json FILE [--batch 32] [--repetitions 5]

Synthetic views, laptop sizes; steps of both kinds alternate, medians are reported. `overhead` is the time of the step (drawing and
pooling regions, loss, target and queues) over that of the same networks with a trivial loss. Each objective runs in a process of
its own, whose peak resident memory is reported; operations are counted for one image.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.process_memory import peak_mib
from workloads.config import build, read_yaml
from workloads.evaluation.compare import flops_per_image
from workloads.spec.factory import build_objective, render_views
from workloads.spec.pretrain import ORCHESTRATOR_SECTIONS, PretrainConfig
from workloads.types import ImageBatch

EXPERIMENTS = Path(__file__).parents[2] / "orchestrator" / "experiments"
NAMES = ("compare_ntxent", "compare_anchor", "compare_detcon_s", "compare_detcon_b", "compare_detco")


def settings_of(name: str) -> PretrainConfig:
    data = read_yaml(next(EXPERIMENTS.glob(f"*/{name}.yaml")))
    return build(PretrainConfig, {key: value for key, value in data.items() if key not in ORCHESTRATOR_SECTIONS})


def batch_of(size: int, side: int) -> ImageBatch:
    grid = torch.arange(side) * 5 // side
    return ImageBatch.of(
        torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        regions=(1 + grid[:, None] * 5 + grid).int().expand(size, -1, -1),
        num_regions=25,
    )


def measure(name: str, size: int, repetitions: int) -> dict[str, float]:
    settings = settings_of(name)
    torch.manual_seed(0)
    model = build_objective(settings).to(memory_format=torch.channels_last).train()
    views = render_views(batch_of(size, settings.data.decode_size or 256), settings)

    def whole() -> None:
        model.zero_grad(set_to_none=True)
        model(views).loss.backward()
        model.after_update(10, 100)

    def networks() -> None:
        model.zero_grad(set_to_none=True)
        embedded = model.embed(views)
        sum(x.sum() for x in embedded.values() if x.requires_grad).backward()

    times: dict[str, list[float]] = {"whole": [], "networks": []}
    for repetition in range(repetitions + 1):
        for kind, step in (("whole", whole), ("networks", networks)):
            began = time.perf_counter()
            step()
            if repetition:  # the first touches memory and fills queues
                times[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "step_s": medians["whole"],
        "networks_s": medians["networks"],
        "overhead": medians["whole"] / medians["networks"],
        "images_per_s": size / medians["whole"],
        "peak_mib": peak_mib(),
        "gflops_per_image": flops_per_image(settings) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        options.json.write_text(json.dumps(measure(options.only, options.batch, options.repetitions)))
        return
    found = {}
    for name in NAMES:
        given = ["--json", str(options.json), "--batch", str(options.batch), "--repetitions", str(options.repetitions)]
        subprocess.run([sys.executable, __file__, *given, "--only", name], check=True)
        found[name] = json.loads(options.json.read_text())
        print(name, {key: round(value, 3) for key, value in found[name].items()})
    options.json.write_text(
        json.dumps({"batch": options.batch, "threads": torch.get_num_threads(), "objectives": found}, indent=1)
    )


if __name__ == "__main__":
    main()
