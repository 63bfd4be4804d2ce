"""Discovery whose actors die: another takes the part up, and every image is there once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset


def test_an_actor_is_killed_in_the_middle(coco: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "runs" / "found"
    options = (
        "trunk.kind=vit",
        "trunk.vit.depth=2",
        "part_size=1",
        "gallery=0",
        "scaling.num_workers=2",
        "scaling.cpus_per_worker=1",
    )
    command = [sys.executable, "-m", "orchestrator", "discover", f"uri={coco['train']}", f"output={output}", *options]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = 0
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if not killed and list(output.glob("_parts/*/part-*.parquet")):
            for child in psutil.Process(process.pid).children(recursive=True):
                # The name of an actor's process is its class.
                if child.is_running() and "PartActor" in " ".join(child.cmdline()):
                    child.kill()
                    killed += 1
                    break
        time.sleep(0.01)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and killed == 1, told
    table = pq.read_table(output / "lost" / "boxes.parquet")
    assert sorted(table["image_id"].to_pylist()) == sorted(read_annotations(open_dataset(coco["train"])))
