"""Measures time and memory of a few training steps in a separate process (`measure`), for `orchestrator plan`."""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.experiments.spec import AnyExperiment, FinetuneExperiment, TrainExperiment, command_of
from workloads.config import to_yaml
from workloads.errors import RunFailedError
from workloads.evaluation.representation import RepresentationEvaluation
from workloads.metrics.representation import RepresentationConfig

CALIBRATION_STEPS = 8
_WARM_UP = 3  # of these steps: memory is allocated and threads start
_EVALUATED = 8  # images that the calibration evaluates

_Records = list[dict[str, Any]]


class CalibrationError(RunFailedError):
    """The measured steps failed; the message has the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Time and memory of one worker's share of a batch, measured on this machine."""

    step_s: float
    """Median time of a step after the warm-up, seconds."""
    data_wait_share: float
    """Share of the time in which a step waited for data."""
    image_evaluation_s: float
    """Time to evaluate one image of `evaluation.uri`, its untrained networks included, seconds; 0 without one."""
    representation_image_s: float = 0.0
    """Time to extract the features of one image of `evaluation.representation`, seconds; 0 without one."""
    peak_bytes: int
    """Largest resident memory of the process."""
    checkpoint_bytes: int


def measure(experiment: AnyExperiment) -> Calibration:
    """Train one worker's share of a batch for a few steps in a separate process, which frees its memory when it ends.

    Raises:
        CalibrationError: the steps failed.
    """
    share = math.ceil(experiment.global_batch_size / experiment.scaling.most_workers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peak_bytes = _train(experiment, share, folder)
        output = folder / "run"
        records: _Records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        meta = json.loads(next(output.glob("checkpoints/step_*/meta.json")).read_text())
    steps = [record for record in records if "train/loss" in record]
    timed = steps[_WARM_UP:]
    step_s = statistics.median(share / record["train/images_per_s"] for record in timed)
    grid_s, representation_s = _evaluation_times(records, begin_s=steps[-2]["seconds"] + step_s)
    settings = _representation(experiment)
    count = 0
    if settings is not None:
        split = RepresentationEvaluation.check(_shortened(settings))[2]
        count = len(split.train) + len(split.test)
    return Calibration(
        step_s=step_s,
        data_wait_share=statistics.mean(record["train/data_wait_share"] for record in timed),
        image_evaluation_s=grid_s,
        representation_image_s=representation_s / count if count else 0.0,
        peak_bytes=peak_bytes,
        checkpoint_bytes=meta["state_bytes"],
    )


def _train(experiment: AnyExperiment, share: int, folder: Path) -> int:
    """Run the steps, with the output in `folder / "run"`; returns the peak of resident memory, bytes."""
    file, errors = folder / "experiment.yaml", folder / "errors"
    file.write_text(to_yaml(experiment.science), encoding="utf-8")
    overrides = [f"{key}={value}" for key, value in _overrides(experiment, share).items()]
    command = [sys.executable, "-m", "workloads", command_of(experiment), str(file), "--output", str(folder / "run")]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, *overrides],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": str(experiment.scaling.threads)},
        )
        peak_bytes = _wait_and_watch(process)
    if process.returncode != 0:
        lines = errors.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise CalibrationError(f"calibration: {CALIBRATION_STEPS} steps failed ({reason})")
    return peak_bytes


def _overrides(experiment: AnyExperiment, share: int) -> Mapping[str, object]:
    """What the measured steps have in place of the experiment's values: few images, and only the last step's evaluation."""
    overrides: dict[str, object] = {
        "steps": CALIBRATION_STEPS,
        "global_batch_size": share,
        "data.lanes": "null",
        "log_every": 1,
        "checkpoint_every": "null",
        "checkpoint_epochs": "null",
        "ledger": "null",
        "evaluation.at_start": "false",
        "evaluation.every_steps": "null",
        "evaluation.limit": _EVALUATED,
    }
    match experiment:
        case TrainExperiment():
            overrides["evaluation.heatmaps"] = 0
            if (settings := experiment.evaluation.representation) is not None:
                short = _shortened(settings)
                for key in ("per_class", "test_limit", "linear", "bootstrap"):
                    overrides[f"evaluation.representation.{key}"] = json.dumps(getattr(short, key))
        case FinetuneExperiment():
            overrides["evaluation.pictures"] = 0
    return overrides


def _representation(experiment: AnyExperiment) -> RepresentationConfig | None:
    return experiment.evaluation.representation if isinstance(experiment, TrainExperiment) else None


def _shortened(settings: RepresentationConfig) -> RepresentationConfig:
    """One training image of each class, a few test images, and no linear probe, which so few images cannot train."""
    return replace(settings, per_class=1, test_limit=_EVALUATED, linear=False, bootstrap=100)


def _evaluation_times(records: _Records, *, begin_s: float) -> tuple[float, float]:
    """Seconds of the last evaluation: on grids or of detections, for each image; and of the representation, in all."""
    last = [record for record in records if record["step"] == CALIBRATION_STEPS and "train/loss" not in record]
    image_s = representation_s = 0.0
    for record in last:
        if "eval/images" in record:
            image_s = max(0.0, record["seconds"] - begin_s) / record["eval/images"]
        if "eval/knn_images" in record:
            representation_s = max(0.0, record["seconds"] - begin_s)
        begin_s = record["seconds"]
    return image_s, representation_s


def _wait_and_watch(process: "subprocess.Popen[bytes]") -> int:
    """Wait for `process`; returns its peak resident memory, bytes.

    The system's own figure of a child (ru_maxrss) includes what its parent held when it was started.
    """
    import psutil

    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.02)
    return peak
