"""Measures how long a run takes to continue after a fault, phase by phase, what it loses, and what its checkpoints cost.

    python tests/benchmarks/recovery.py --json recovery.json [--repetitions 5] [--faults worker node shrink]
        [--paths fast no_standby public alone] [--dataset DATASET] [--no-checkpoints]

Faults on a real cluster of two nodes on this machine, with the chaos suite's tiny run. `fast` and `public` are
`scaling.fast_start` true and false, `no_standby` is fast without standby processes, `alone` is Ray Train with a step that adds
two numbers; they take turns, so that a change in the machine's load meets all of them. Seconds are from the kill to the end of
the first step afterwards. Phases: `detect` until the failure is classified; `workers` until the new worker's function begins
(of which `process` starting and preloading its process, 0 for a standby process); `imports` of the worker; `restore` of the
checkpoint; `first_step`, which builds the model. The cost of checkpoints is the share of the training time for which they held
the steps up, counted inside a run of a ResNet-18 with a checkpoint every 50 steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.chaos.conftest import (  # noqa: E402
    BATCH,
    IMAGES,
    Driver,
    Nodes,
    build_images,
    driver_of,
    journals,
    train_workers,
    wait_step,
)
from workloads.data.loading.ledger import read_ledger  # noqa: E402

LENGTH = 160
IN_ITS_COURSE_S = 20.0
ELASTIC = ("scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=2", "scaling.threads_per_worker=1")
GOALS_S = {"worker": 8.0, "node": 15.0, "shrink": 6.0}
PATHS = {
    "fast": ("scaling.fast_start=true",),
    "no_standby": ("scaling.fast_start=true", "failure.spare_processes=false"),
    "public": ("scaling.fast_start=false",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--paths", nargs="+", choices=[*PATHS, "alone"], default=[*PATHS, "alone"])
    parser.add_argument("--dataset", help="images for the checkpoints' cost; default: the chaos suite's")
    parser.add_argument("--no-checkpoints", action="store_true", help="leave the checkpoints' cost out")
    options = parser.parse_args()
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {fault: {} for fault in options.faults}
    with tempfile.TemporaryDirectory() as scratch:
        images = build_images(Path(scratch, "images"))
        for turn in range(options.repetitions):
            for fault in options.faults:
                for path in options.paths:
                    folder = Path(scratch, f"{fault}-{path}-{turn}")
                    if path == "alone":
                        if fault == "shrink":
                            continue
                        one = {"next_step_s": ray_alone(folder, fault)}
                    else:
                        one = recover(folder, images, fault, path)
                    measured[fault].setdefault(path, []).append(one)
                    print(turn, fault, path, one, file=sys.stderr)
                    write(options.json, measured, {})
        cost = {} if options.no_checkpoints else checkpoint_cost(Path(scratch, "cost"), options.dataset or images)
    print(json.dumps(write(options.json, measured, cost), indent=2))


def write(path: Path, measured: dict[str, dict[str, list[dict[str, Any]]]], cost: dict[str, float]) -> dict[str, Any]:
    """Write the summary of what is measured so far."""
    faults = {
        fault: {"goal_s": GOALS_S[fault], **{kind: summary(runs) for kind, runs in by_path.items()}}
        for fault, by_path in measured.items()
    }
    result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "faults": faults, **cost}
    path.write_text(json.dumps(result, indent=2))
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of the seconds, medians of the phases, and sums of what was lost."""
    seconds = [round(run["next_step_s"], 2) for run in runs]
    found: dict[str, Any] = {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
    found["all_s"] = seconds
    if "phases" in runs[0]:
        phases = runs[0]["phases"]
        found["phases_s"] = {key: round(statistics.median(run["phases"][key] for run in runs), 2) for key in phases}
        found["steps_repeated"] = max(run["steps_repeated"] for run in runs)
        found["samples_lost"] = sum(run["lost"] for run in runs)
        found["samples_duplicated"] = sum(run["duplicated"] for run in runs)
    return found


def lose_and_replace(nodes: Nodes) -> None:
    """A node dies, and the cluster's owner has another one at hand."""
    nodes.kill_other()
    nodes.join()


FAULTS: dict[str, tuple[Callable[[Nodes], None], tuple[str, ...]]] = {
    "worker": (lambda nodes: train_workers()[0].kill(), ()),
    "node": (lose_and_replace, ("scaling.placement=STRICT_SPREAD",)),
    "shrink": (Nodes.kill_other, ELASTIC),
}
"""Fault → how it is done, and the overrides of the run that it hits."""


def recover(folder: Path, images: str, fault: str, path: str) -> dict[str, Any]:
    """One run that is hit by a fault when its standby processes have had time to start."""
    hurt, overrides = FAULTS[fault]
    folder.mkdir()
    nodes = Nodes()
    try:
        given = (f"steps={LENGTH}", *PATHS[path], *overrides)
        driver = driver_of(folder, images, nodes, *given).start()
        wait_step(driver, 6)
        time.sleep(IN_ITS_COURSE_S)
        killed, killed_monotonic = time.time(), time.monotonic()
        hurt(nodes)
        if driver.wait() != 0:
            raise RuntimeError(driver.text[-3000:])
        return {**next_step(driver, killed, killed_monotonic), **losses_of_data(folder)}
    finally:
        nodes.close()


RAY_ALONE = """
import json, sys, time
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, report
from ray.train.torch import TorchTrainer

def loop(config):
    import torch
    import torch.distributed as dist
    for _ in range(config["steps"]):
        value = torch.ones(())
        dist.all_reduce(value)
        time.sleep(0.2)
        with open(config["log"], "a") as log:
            log.write(f"{time.time()}\\n")
        report({"value": float(value)})

TorchTrainer(
    loop,
    train_loop_config={"steps": 40, "log": sys.argv[1]},
    scaling_config=ScalingConfig(num_workers=2, placement_strategy=sys.argv[3]),
    run_config=RunConfig(storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=3)),
).fit()
"""


def ray_alone(folder: Path, fault: str) -> float:
    """The floor: seconds from the fault to the next step of Ray Train itself, with a step that only adds two numbers."""
    folder.mkdir()
    log = folder / "steps"
    log.touch()
    nodes = Nodes()
    try:
        environment = {**os.environ, "RAY_ADDRESS": nodes.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        command = [sys.executable, "-c", RAY_ALONE, str(log), str(folder / "storage")]
        command.append("STRICT_SPREAD" if fault == "node" else "SPREAD")
        with (folder / "driver.log").open("wb") as output:
            driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while len(log.read_text().splitlines()) < 12:
            if driver.poll() is not None:
                raise RuntimeError((folder / "driver.log").read_text()[-2000:])
            time.sleep(0.02)
        killed = time.time()
        FAULTS[fault][0](nodes)
        if driver.wait() != 0:
            raise RuntimeError((folder / "driver.log").read_text()[-2000:])
    finally:
        nodes.close()
    # What the other worker wrote before it noticed comes within moments of the kill.
    return next(float(line) for line in log.read_text().splitlines() if float(line) > killed + 2.0) - killed


def next_step(driver: Driver, killed: float, killed_monotonic: float) -> dict[str, Any]:
    """Seconds to the first step that ended after the kill in another attempt, its phases, and how many steps were repeated."""
    records = [json.loads(line) for path in journals(driver.folder) for line in path.read_text().splitlines()]
    classified: float | None = None
    newest = 0
    for record in records:
        if record["kind"] == "fault" and classified is None:
            classified = record["failure"]["at_s"] - killed_monotonic
        elif record["kind"] == "metrics" and "train/loss" in record["metrics"]:
            ended = record["time_ms"] / 1000 - killed
            # What is reported again comes with its old time; only the new attempt's first report has its start's figures.
            if classified is not None and ended > 0 and "startup/first_step_s" in record["metrics"]:
                repeated = newest - record["step"] + 1
                return {
                    "next_step_s": ended,
                    "steps_repeated": repeated,
                    "phases": phases(record["metrics"], classified, ended),
                }
            newest = max(newest, record["step"])
    raise RuntimeError(f"the run was not hurt:\n{driver.text[-2000:]}")


def phases(metrics: dict[str, float], classified: float, ended: float) -> dict[str, float]:
    """Where the seconds from the kill to the end of the next step went."""
    imports, restore = metrics["startup/worker_imports_s"], metrics["startup/restore_s"]
    entered = ended - metrics["startup/first_step_s"] - imports
    age = metrics["startup/process_age_s"]
    return {
        "detect": classified,
        "workers": entered - classified,
        "process": age if entered - age > 0 else 0.0,
        "imports": imports,
        "restore": restore,
        "first_step": metrics["startup/first_step_s"] - restore,
    }


def losses_of_data(folder: Path) -> dict[str, int]:
    """Images that the surviving history trained on less, or more, than once an epoch."""
    trained: dict[int, Counter[str]] = {}
    for line in read_ledger(folder / "ledger"):
        trained.setdefault(line["epoch"], Counter()).update(i for i, _ in line["trained"])  # type: ignore[call-overload,attr-defined]
    per_epoch, total = IMAGES // BATCH * BATCH, LENGTH * BATCH
    wanted = {epoch: min(per_epoch, total - start) for epoch, start in enumerate(range(0, total, per_epoch))}
    lost = sum(count - len(trained.get(epoch, ())) for epoch, count in wanted.items())
    return {"lost": lost, "duplicated": sum(sum(c - 1 for c in counts.values()) for counts in trained.values())}


def checkpoint_cost(folder: Path, dataset: str) -> dict[str, float]:
    """The loop without Ray on a ResNet-18 at 128 px: the share of its time for which checkpoints held it up."""
    experiment = ROOT / "orchestrator" / "experiments" / "anchor_ntxent_caltech.yaml"
    batch, window = 16, 10
    overrides = [f"data.uri={dataset}", "steps=160", "checkpoint_every=50", "checkpoint_epochs=null"]
    overrides += [f"global_batch_size={batch}", f"log_every={window}"]
    command = [sys.executable, "-m", "workloads", "train", str(experiment), "--output", str(folder), *overrides]
    subprocess.run([*command, "evaluation.uri=null"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [record["train/checkpoint_share"] for record in records if "train/checkpoint_share" in record]
    seconds = [batch * window / record["train/images_per_s"] for record in records if "train/images_per_s" in record]
    held = [share * s for share, s in zip(shares, seconds, strict=True)]
    return {
        # The checkpoint at the end, which is waited for, comes after the last record.
        "checkpoint_cost_share": round(sum(held) / sum(seconds), 5),
        "checkpoint_holds_ms_worst": round(1000 * max(held), 1),
    }


if __name__ == "__main__":
    main()
