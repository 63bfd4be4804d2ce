"""How long a cluster on this machine takes to come up, a job to its first step, and what a second worker brings.

    python tests/benchmarks/cluster.py --json cluster.json [--repetitions 2]

Weak scaling: one worker of one thread with 16 images a step on one raylet, then two of them with 32 on two. What two workers lose
has three causes, told apart in the same run: the cores they share (two loops side by side that know nothing of each other), what
they tell each other and their waiting for the slower one (two ranks of torchrun), and the cluster's own processes (the rest).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from cluster.local import LocalCluster, down, up  # noqa: E402
from orchestrator.datasets.build import build_dataset  # noqa: E402
from orchestrator.demo.scenes import write_scenes  # noqa: E402
from orchestrator.ray_support.spare_processes import importing  # noqa: E402
from orchestrator.training import PRELOAD  # noqa: E402
from tests.cluster.conftest import free_options  # noqa: E402
from workloads.data.build.shards import BuildConfig  # noqa: E402
from workloads.data.build.sources import FolderSourceConfig  # noqa: E402

EXPERIMENT = """
name: scaling
steps: {steps}
global_batch_size: {batch}
log_every: 10
checkpoint_every: null
checkpoint_epochs: null
data: {{uri: {data}, decode_size: 128, decode_threads: 1}}
views: {{full_size: 128, crop_size: 32, crops_per_image: 4}}
backbone: {{norm: group}}
objective: {{kind: anchor_ntxent, levels: [P3, P4], crop_stages: [C2]}}
evaluation: {{uri: null}}
"""
RAY_ONLY = """
storage: {{path: {runs}}}
scaling: {{num_workers: {workers}, cpus_per_worker: 1, placement: SPREAD}}
tracking: {{system_metrics: false, log_model: false, run_name: {name}}}
"""
STEPS, BATCH = 60, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    result: dict[str, Any] = {"up_s": [], "submit_to_first_step_s": [], "startup": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_scenes(folder / "images", split="train", count=64, side=128)
        source = FolderSourceConfig(inputs=(str(folder / "images"),))
        build_dataset(BuildConfig(source=source, output=str(folder / "shards")))
        kinds = ("alone", "side by side", "two ranks", "1 worker", "2 workers")
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repetition in range(options.repetitions):
            speeds["alone"] += bare(folder, repetition, count=1)
            speeds["side by side"] += bare(folder, repetition, count=2)
            speeds["two ranks"].append(two_ranks(folder, repetition))
            began = time.monotonic()
            node = {**importing(PRELOAD), "RAY_worker_niceness": "0"}
            cluster = up(folder / f"cluster{repetition}", free_options(nodes=2, cpus_per_node=1), node_environment=node)
            result["up_s"].append(round(time.monotonic() - began, 1))
            try:
                for workers in (1, 2):
                    speed, first, phases = submitted(folder, cluster, repetition, workers)
                    speeds[f"{workers} worker{'s' if workers > 1 else ''}"].append(speed)
                    result["submit_to_first_step_s"].append(round(first, 1))
                    result["startup"].append(phases)
            finally:
                down(Path(cluster.folder))
            print(json.dumps({**result, **speeds}), file=sys.stderr)
    median = {name: statistics.median(found) for name, found in speeds.items()}
    result["images_per_s"] = {name: round(value, 2) for name, value in median.items()}
    result["weak_scaling_efficiency"] = round(median["2 workers"] / (2 * median["1 worker"]), 3)
    result["without_ray"] = {
        "cores_shared": round(median["side by side"] / median["alone"], 3),
        "and_together": round(median["two ranks"] / (2 * median["alone"]), 3),
    }
    options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def bare(folder: Path, repetition: int, *, count: int) -> list[float]:
    """Images per second of each of `count` loops without Ray that run at the same time, one thread each."""
    started = []
    for number in range(count):
        place = folder / f"bare-{count}-{repetition}-{number}"
        place.mkdir()
        text = EXPERIMENT.format(steps=STEPS, batch=BATCH, data=folder / "shards")
        (place / "experiment.yaml").write_text(text)
        command = [sys.executable, "-m", "workloads", "train", str(place / "experiment.yaml"), "--output", str(place)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append((place, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)))
    for _, process in started:
        if process.wait() != 0:
            raise RuntimeError("a loop without Ray failed")
    return [speed_of(place / "metrics.jsonl") for place, _ in started]


def two_ranks(folder: Path, repetition: int) -> float:
    """Images per second of one loop on two ranks without Ray, one thread each."""
    place = folder / f"ranks-{repetition}"
    place.mkdir()
    text = EXPERIMENT.format(steps=STEPS, batch=2 * BATCH, data=folder / "shards")
    (place / "experiment.yaml").write_text(text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "workloads", "train", str(place / "experiment.yaml"), "--output", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return speed_of(place / "metrics.jsonl")


def speed_of(path: Path) -> float:
    """The median of the windows, the first of which warms up."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [r.get("metrics", r).get("train/images_per_s") for r in records]
    return statistics.median([value for value in found if value is not None][1:])


def submitted(
    folder: Path, cluster: LocalCluster, repetition: int, workers: int
) -> tuple[float, float, dict[str, float]]:
    """Images per second of a submitted run; seconds from the command to its first step; the phases of its own start."""
    name = f"scaling-{repetition}-{workers}"
    path = folder / f"{name}.yaml"
    text = EXPERIMENT.format(steps=STEPS, batch=BATCH * workers, data=folder / "shards")
    path.write_text(text + RAY_ONLY.format(runs=folder / "runs", workers=workers, name=name))
    environment = {**os.environ, **cluster.environment()}
    began = time.time()
    command = [sys.executable, "-m", "orchestrator", "submit", str(path), "--address", cluster.dashboard]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    journal = folder / "runs" / name / "journal.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    phases = {
        key.removeprefix("startup/"): round(value, 2)
        for record in records
        for key, value in record.get("metrics", {}).items()
        if key.startswith("startup/") and key.endswith("_s")
    }
    driver = next(record["time_ms"] for record in records if record["kind"] == "tags") / 1000
    phases["job_s"] = round(driver - began, 2)
    return speed_of(journal), driver - began + phases["total_s"], phases


if __name__ == "__main__":
    main()
