"""How long a run takes to go on after a fault, what it loses, and what its checkpoints cost.

    python tests/benchmarks/recovery.py --json recovery.json [--repetitions 3] [--dataset DATASET]

Faults on a real cluster of two nodes on this machine, with the chaos suite's tiny run; seconds are from the kill to the
end of the first step afterwards, by the workers' clocks, medians over the repetitions; beside them what Ray Train alone takes.
The cost of checkpoints is the share of the training time for which they held the steps up, counted inside a run of a
ResNet-18 with a checkpoint every 50 steps.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dataset", help="images for the checkpoints' cost; default: the chaos suite's")
    options = parser.parse_args()
    result: dict[str, Any] = {"samples_lost": 0, "samples_duplicated": 0, "steps_repeated": {}}
    with tempfile.TemporaryDirectory() as scratch:
        images = build_images(Path(scratch, "images"))
        faults: dict[str, tuple[Callable[[Nodes], None], tuple[str, ...]]] = {
            "worker_kill_next_step_s": (lambda nodes: train_workers()[0].kill(), ()),
            "node_kill_next_step_s": (lose_and_replace, ("scaling.placement=STRICT_SPREAD",)),
            "shrink_next_step_s": (Nodes.kill_other, ELASTIC),
        }
        alone = [ray_alone(Path(scratch, f"alone-{i}")) for i in range(options.repetitions)]
        result["ray_alone_worker_kill_next_step_s"] = round(statistics.median(alone), 2)
        print("ray alone", [round(s, 2) for s in alone], file=sys.stderr)
        for name, (hurt, overrides) in faults.items():
            found = [recover(Path(scratch, f"{name}-{i}"), images, hurt, overrides) for i in range(options.repetitions)]
            result[name] = round(statistics.median(one["next_step_s"] for one in found), 2)
            result[f"{name}_all"] = [round(one["next_step_s"], 2) for one in found]
            result["steps_repeated"][name] = max(one["steps_repeated"] for one in found)
            result["samples_lost"] += sum(one["lost"] for one in found)
            result["samples_duplicated"] += sum(one["duplicated"] for one in found)
            print(name, result[f"{name}_all"], file=sys.stderr)
        result |= checkpoint_cost(Path(scratch, "cost"), options.dataset or images)
    options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


def lose_and_replace(nodes: Nodes) -> None:
    """A node dies, and the cluster's owner has another one at hand."""
    nodes.kill_other()
    nodes.join()


def recover(folder: Path, images: str, hurt: Callable[[Nodes], None], overrides: tuple[str, ...]) -> dict[str, Any]:
    """One run that is hurt in its course, when its spare processes have had time to start."""
    folder.mkdir()
    nodes = Nodes()
    try:
        driver = driver_of(folder, images, nodes, f"steps={LENGTH}", *overrides).start()
        wait_step(driver, 6)
        time.sleep(IN_ITS_COURSE_S)
        killed_ms = time.time() * 1000
        hurt(nodes)
        if driver.wait() != 0:
            raise RuntimeError(driver.text[-3000:])
        return {**next_step(driver, killed_ms), **losses_of_data(folder)}
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
    scaling_config=ScalingConfig(num_workers=2, placement_strategy="SPREAD"),
    run_config=RunConfig(storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=1)),
).fit()
"""


def ray_alone(folder: Path) -> float:
    """The floor: seconds from a worker's kill to the next step of Ray Train itself, with a step that only adds two numbers."""
    folder.mkdir()
    log = folder / "steps"
    log.touch()
    nodes = Nodes()
    try:
        environment = {**os.environ, "RAY_ADDRESS": nodes.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        command = [sys.executable, "-c", RAY_ALONE, str(log), str(folder / "storage")]
        with (folder / "driver.log").open("wb") as output:
            driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while len(log.read_text().splitlines()) < 12:
            if driver.poll() is not None:
                raise RuntimeError((folder / "driver.log").read_text()[-2000:])
            time.sleep(0.02)
        killed = time.time()
        train_workers()[0].kill()
        if driver.wait() != 0:
            raise RuntimeError((folder / "driver.log").read_text()[-2000:])
    finally:
        nodes.close()
    # What the other worker wrote before it noticed comes within moments of the kill.
    return next(float(line) for line in log.read_text().splitlines() if float(line) > killed + 2.0) - killed


def next_step(driver: Driver, killed_ms: float) -> dict[str, float]:
    """Seconds to the first step that ended after the kill in another attempt, and how many steps were done again."""
    records = [json.loads(line) for path in journals(driver.folder) for line in path.read_text().splitlines()]
    after_fault = False
    newest = 0
    for record in records:
        if record["kind"] == "fault":
            after_fault = True
        elif record["kind"] == "metrics" and "train/loss" in record["metrics"]:
            if after_fault and record["time_ms"] > killed_ms:
                return {
                    "next_step_s": (record["time_ms"] - killed_ms) / 1000,
                    "steps_repeated": newest - record["step"] + 1,
                }
            newest = max(newest, record["step"])
    raise RuntimeError(f"the run was not hurt:\n{driver.text[-2000:]}")


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
