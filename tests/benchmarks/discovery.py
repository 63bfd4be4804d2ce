"""Measures the speed of discovery: the LOST step beside the forward pass before it, and images/s of `orchestrator discover`.

    python tests/benchmarks/discovery.py DATASET --json discovery.json [--repetitions 3] [--side 480] [--batch 8] [key=value …]

The step takes the keys of ViT-S/16 at side × side pixels (900 patches of 384 at 480) to boxes, components included, batched;
forward and step are measured in turn on the same threads, medians per image. `orchestrator discover` runs with one actor and
with two, of one CPU each, in turn; its images/s are from the first image to the last, its start-up time is reported apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workloads.discovery.lost import lost
from workloads.discovery.tokencut import tokencut
from workloads.models.vit import VitConfig, VitTrunk


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def step(side: int, batch: int, repetitions: int) -> dict[str, float]:
    """Milliseconds an image: the complete forward pass, the pass up to the last keys, LOST, TokenCut (one image)."""
    torch.manual_seed(0)
    trunk = VitTrunk(VitConfig(name="vit_small")).eval()
    images = torch.randn(batch, 3, side, side)
    last = trunk.last_attention(images)
    times: dict[str, list[float]] = {"forward": [], "to_keys": [], "lost": [], "tokencut": []}
    for i in range(repetitions + 1):
        taken = {
            "forward": seconds(lambda: trunk(images)) / batch,
            "to_keys": seconds(lambda: trunk.last_attention(images)) / batch,
            "lost": seconds(lambda: lost(last.keys, last.grid_hw)) / batch,
            "tokencut": seconds(lambda: tokencut(last.keys[:1], last.grid_hw)),
        }
        for name, value in taken.items():
            times[name] += [1000 * value] if i else []  # the first round warms up
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {
        **medians,
        "lost_share_of_forward": medians["lost_ms"] / medians["forward_ms"],
        "patches": float(last.keys.shape[1]),
    }


def discover(dataset: str, output: Path, actors: int, overrides: list[str]) -> dict[str, float]:
    """images/s and seconds to the first image of one `orchestrator discover`."""
    placed = [f"uri={dataset}", f"output={output}", f"scaling.num_workers={actors}", "scaling.cpus_per_worker=1"]
    command = [sys.executable, "-m", "orchestrator", "discover", *placed, "part_size=16", "gallery=0", *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    figures = json.loads((output / "figures.json").read_text())["figures"]
    return {name: figures[f"discover/{name}"] for name in ("images_per_s", "startup_s")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--side", type=int, default=480)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_intermixed_args()
    uri = str(Path(options.dataset).resolve())
    result: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "step": step(options.side, options.batch, 2 * options.repetitions + 1),
    }
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(options.repetitions):
            for actors, measured in runs.items():
                measured.append(discover(uri, Path(scratch, f"{i}-{actors}", "output"), actors, options.overrides))
    result["discover"] = {
        f"{actors} actor{'s' if actors > 1 else ''}": {
            "images_per_s": [run["images_per_s"] for run in measured],
            "median_images_per_s": statistics.median(run["images_per_s"] for run in measured),
            "startup_s": [run["startup_s"] for run in measured],
        }
        for actors, measured in runs.items()
    }
    options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
