"""Measures a few training steps in a process of its own, for `orchestrator plan`."""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.experiments.spec import AnyExperiment, command_of
from workloads.config import to_yaml
from workloads.errors import RunFailedError

CALIBRATION_STEPS = 8
_WARM_UP = 3  # of them: memory is touched and threads start
_EVALUATED = 8  # images that the calibration evaluates


class CalibrationError(RunFailedError):
    """The few measured steps did not end; the message has the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A few steps of one worker's share, measured on this machine."""

    step_s: float  # median of the steps after the warm-up
    data_wait_share: float
    image_evaluation_s: float  # for one image of the last evaluation, its untrained networks included; 0 without one
    peak_bytes: int  # resident memory of the process
    checkpoint_bytes: int


def measure(experiment: AnyExperiment) -> Calibration:
    """Train one worker's share of a batch for a few steps in a process of its own, which ends with its memory.

    Raises:
        CalibrationError: it failed.
    """
    share = math.ceil(experiment.global_batch_size / experiment.scaling.most_workers)
    with tempfile.TemporaryDirectory() as scratch:
        file, output, errors = Path(scratch, "experiment.yaml"), Path(scratch, "run"), Path(scratch, "errors")
        file.write_text(to_yaml(experiment.science), encoding="utf-8")
        overrides = {
            "steps": CALIBRATION_STEPS,
            "global_batch_size": share,
            "data.lanes": "null",
            "log_every": 1,
            "checkpoint_every": "null",
            "checkpoint_epochs": "null",
            "ledger": "null",
            "evaluation.every_steps": "null",
            "evaluation.limit": _EVALUATED,
            "evaluation.heatmaps" if experiment.loop == "pretrain" else "evaluation.pictures": 0,
        }
        command = [sys.executable, "-m", "workloads", command_of(experiment), str(file), "--output", str(output)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *(f"{key}={value}" for key, value in overrides.items())],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": str(experiment.scaling.threads)},
            )
            peak_bytes = _wait_and_watch(process)
        if process.returncode != 0:
            reason = (errors.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[
                -1
            ]
            raise CalibrationError(f"calibration: {CALIBRATION_STEPS} steps did not end ({reason})")
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        meta = json.loads(next(output.glob("checkpoints/step_*/meta.json")).read_text())
    steps = [record for record in records if "train/loss" in record]
    timed = steps[_WARM_UP:]
    step_s = statistics.median(share / record["train/images_per_s"] for record in timed)
    evaluated = [r for r in records if "eval/images" in r and r["step"] == CALIBRATION_STEPS]
    evaluation_s = 0.0
    if evaluated:  # from the last step but one to the evaluation's record lie one step and the evaluation
        evaluation_s = max(0.0, evaluated[0]["seconds"] - steps[-2]["seconds"] - step_s) / evaluated[0]["eval/images"]
    return Calibration(
        step_s=step_s,
        data_wait_share=statistics.mean(record["train/data_wait_share"] for record in timed),
        image_evaluation_s=evaluation_s,
        peak_bytes=peak_bytes,
        checkpoint_bytes=meta["state_bytes"],
    )


def _wait_and_watch(process: "subprocess.Popen[bytes]") -> int:
    """Wait for `process`; returns its peak resident memory, bytes.

    The system's own account of a child (ru_maxrss) begins with what its parent held when it was started.
    """
    import psutil

    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.02)
    return peak
