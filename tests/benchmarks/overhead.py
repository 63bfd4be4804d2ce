"""What Ray and MLflow cost: `orchestrator train` beside the bare `python -m workloads` loop, interleaved, same steps.

    python tests/benchmarks/overhead.py DATASET --json overhead.json [--repetitions 2] [--steps 60] [key=value …]

Compares the loops' own images/s (medians over the records after the first, so that start-up is not in it), with the same
number of threads and the same nice level, and reports where the time from the command to the first step goes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXPERIMENT = Path(__file__).parents[2] / "orchestrator" / "experiments" / "pretrain" / "anchor_ntxent_caltech.yaml"


def bare(overrides: list[str], folder: Path, threads: int, niceness: int) -> list[float]:
    """images/s of each record of the loop without Ray and MLflow."""
    command = [sys.executable, "-m", "workloads", "train", str(EXPERIMENT), "--output", str(folder), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(["nice", "-n", str(niceness), *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/images_per_s"] for record in records if "train/images_per_s" in record]


def orchestrated(overrides: list[str], folder: Path) -> tuple[list[float], dict[str, float]]:
    """images/s of each record of `orchestrator train`, and its start-up phases in seconds."""
    from mlflow import MlflowClient

    command = [sys.executable, "-m", "orchestrator", "train", str(EXPERIMENT), f"storage.path={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    databases = list(folder.rglob("mlflow.db"))
    client = MlflowClient(f"sqlite:///{databases[0]}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    run = client.search_runs(experiments)[0]
    history = client.get_metric_history(run.info.run_id, "train/images_per_s")
    startup = {k: v for k, v in run.data.metrics.items() if k.startswith("startup/")}
    return [m.value for m in sorted(history, key=lambda m: m.step)], startup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--niceness", type=int, default=0)
    options = parser.parse_intermixed_args()
    uri = str(Path(options.dataset).resolve())
    common = [f"data.uri={uri}", f"steps={options.steps}", "log_every=10", "evaluation.uri=null", *options.overrides]
    placed = [f"scaling.niceness={options.niceness}", f"scaling.cpus_per_worker={options.threads}"]
    rates: dict[str, list[float]] = {"workloads": [], "orchestrator": []}
    startups = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(options.repetitions):
            alone = bare(common, Path(scratch, f"bare{i}"), options.threads, options.niceness)
            managed, startup = orchestrated([*common, *placed], Path(scratch, f"ray{i}"))
            rates["workloads"] += alone[1:]
            rates["orchestrator"] += managed[1:]
            startups.append(startup)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "images_per_s": medians,
        "ratio": medians["orchestrator"] / medians["workloads"],
        "records": {name: len(values) for name, values in rates.items()},
        "startup_s": startups,
    }
    options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
