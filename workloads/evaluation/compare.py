"""Compares pretraining runs of several objectives (`compare`): a table (`table`) and a figure (`draw`), first run as baseline.

Only runs that were measured by the same protocol on the same images are compared; all differences are paired on those images.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from workloads.config import build, config_hash, read_yaml
from workloads.errors import ConfigError
from workloads.metrics.representation import paired_gain
from workloads.reports.comparison import RunCurves, draw_comparison
from workloads.spec.factory import build_objective, render_views
from workloads.spec.pretrain import PretrainConfig
from workloads.types import ImageBatch

_COUNTED = 2  # images of the step whose operations are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Config, curves and hits of one run."""

    name: str
    settings: PretrainConfig
    curves: Mapping[str, list[tuple[int, float]]]  # metric → (step, value)
    hits: Mapping[int, Mapping[str, np.ndarray]]  # step → columns of the representation evaluation

    def last(self, metric: str) -> float | None:
        """The last recorded value of `metric`, or None."""
        return self.curves[metric][-1][1] if metric in self.curves else None


def read_run(folder: Path) -> RunRecord:
    """Read a run of `python -m workloads train` from its output folder.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = next(iter(sorted((folder / "checkpoints").glob("step_*/config.yaml"))))
    except (OSError, StopIteration):
        raise ConfigError(
            f"{folder}: holds no finished run (no metrics.jsonl or no checkpoint); give the output folder of `train`"
        ) from None
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in map(json.loads, lines):
        for metric, value in record.items():
            if metric not in ("step", "seconds"):
                curves.setdefault(metric, []).append((record["step"], value))
    settings = build(PretrainConfig, read_yaml(config))
    tables = (folder / "artifacts" / "report").glob("representation_step_*.npz")
    return RunRecord(name=folder.name, settings=settings, curves=curves, hits=read_hits(tables))


def read_hits(files: Iterable[Path]) -> dict[int, dict[str, np.ndarray]]:
    """Step → columns of the tables that representation evaluations wrote as artifacts."""
    tables = {}
    for file in files:
        with np.load(file, allow_pickle=False) as table:
            tables[int(file.stem.rpartition("_")[2])] = {name: table[name] for name in table.files}
    return tables


def flops_per_image(settings: PretrainConfig) -> float:
    """Floating-point operations of one image's forward and backward pass; a multiply-add counts as two."""
    objective = build_objective(settings).train()
    size = settings.data.decode_size or 256
    batch = ImageBatch.of(
        torch.randint(0, 256, (_COUNTED, 3, size, size), dtype=torch.uint8),
        regions=torch.ones((_COUNTED, size, size), dtype=torch.int32),
        num_regions=1,
    )
    views = render_views(batch, settings)
    with FlopCounterMode(display=False) as counter:
        objective(views).loss.backward()
    return counter.get_total_flops() / _COUNTED


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run's row of the comparison."""

    record: RunRecord
    flops_per_image: float
    gains: Mapping[str, tuple[float, float, float]]
    """knn, linear → difference to the run's own untrained trunk, and its 95 % interval."""
    computing_to_baseline: float | None
    """FLOPs at which the baseline's final kNN accuracy is reached, as a share of the baseline's; None: not reached."""


def compare(records: list[RunRecord]) -> list[ComparedRun]:
    """Compare runs; the first one is the baseline.

    Raises:
        ConfigError: a run has no representation evaluation, or one of another protocol than the first run.
    """
    protocols = {record.name: record.settings.evaluation.representation for record in records}
    for name, protocol in protocols.items():
        if protocol is None or not records[0].hits:
            raise ConfigError(
                f"{name}: trained without evaluation.representation, so there is nothing to compare; train it again with it"
            )
        if config_hash(protocol) != config_hash(protocols[records[0].name]):
            raise ConfigError(
                f"{name}: measured by another protocol than {records[0].name}; train it again with the same evaluation.representation"
            )
    costs = [flops_per_image(record.settings) for record in records]
    goal = records[0].curves["eval/knn"][-1]
    spent = _computing(records[0], goal[0], costs[0])
    rows = []
    for record, cost in zip(records, costs, strict=True):
        reached = _reaches(record, goal[1])
        rows.append(
            ComparedRun(
                record=record,
                flops_per_image=cost,
                gains=_gains(record),
                computing_to_baseline=None if reached is None else _computing(record, reached, cost) / spent,
            )
        )
    return rows


def _computing(record: RunRecord, step: float, cost: float) -> float:
    return step * record.settings.global_batch_size * cost


def _reaches(record: RunRecord, goal: float) -> float | None:
    """The step at which the kNN curve first reaches `goal`, interpolated linearly between evaluations."""
    curve = record.curves["eval/knn"]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if high >= goal:
            return after if low >= goal else before + (after - before) * (goal - low) / (high - low)
    return None


def _gains(record: RunRecord) -> dict[str, tuple[float, float, float]]:
    protocol = record.settings.evaluation.representation
    first, last = record.hits[min(record.hits)], record.hits[max(record.hits)]
    if protocol is None or not np.array_equal(first["image"], last["image"]):
        return {}
    return {
        name: paired_gain(last[name], first[name], last["label"], protocol)
        for name in ("knn", "linear")
        if name in first and name in last
    }


def table(rows: list[ComparedRun]) -> str:
    """The comparison as Markdown; shares in per cent, 95 % intervals over images in brackets."""
    first = rows[0].record
    chance, thumbnails = (100 * (first.last(f"eval/{name}") or 0) for name in ("knn_chance", "knn_pixel"))
    header = (
        *("run", "images trained on", "GFLOPs an image", "images/s", "loss"),
        *("kNN", "over untrained, paired", "linear", "over untrained, paired", f"computing to {first.name}'s kNN"),
    )
    lines = [
        f"kNN and linear probe: mean over classes, {int(first.last('eval/knn_images') or 0)} images; chance {chance:.1f} %, "
        f"thumbnails without any network {thumbnails:.1f} %.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *map(_cells, rows))),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: ComparedRun) -> tuple[str, ...]:
    record = row.record
    steps, losses = record.settings.steps, record.curves["train/loss"]
    speed = np.median([value for _, value in record.curves["train/images_per_s"]])
    reached = "not reached" if row.computing_to_baseline is None else f"{row.computing_to_baseline:.2f} ×"
    return (
        record.name,
        f"{steps * record.settings.global_batch_size:,} in {steps} steps",
        f"{row.flops_per_image / 1e9:.2f}",
        f"{speed:.1f}",
        f"{losses[0][1]:.2f} → {losses[-1][1]:.2f}",
        *(shown for name in ("knn", "linear") for shown in (_with_interval(record, name), _gain(row, name))),
        reached,
    )


def _with_interval(record: RunRecord, name: str) -> str:
    value = record.last(f"eval/{name}")
    if value is None:
        return "–"
    low, high = record.last(f"eval/{name}_low"), record.last(f"eval/{name}_high")
    return f"{100 * value:.1f} [{100 * (low or 0):.1f}, {100 * (high or 0):.1f}]"


def _gain(row: ComparedRun, name: str) -> str:
    if name not in row.gains:
        return "–"
    value, low, high = (100 * part for part in row.gains[name])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def draw(rows: list[ComparedRun], target: Path) -> None:
    """Write a PNG: each run's loss over images, and its kNN accuracy over computing."""
    first = rows[0].record
    baselines = {
        name: first.last(key) or 0.0
        for name, key in (("thumbnails, no network", "eval/knn_pixel"), ("chance", "eval/knn_chance"))
    }
    draw_comparison([_curves(row) for row in rows], baselines, target)


def _curves(row: ComparedRun) -> RunCurves:
    record = row.record
    losses = record.curves["train/loss"]
    low, high = (dict(record.curves[f"eval/knn_{end}"]) for end in ("low", "high"))
    return RunCurves(
        name=record.name,
        loss=[(step * record.settings.global_batch_size, loss / losses[0][1]) for step, loss in losses],
        accuracy=[
            (_computing(record, step, row.flops_per_image), value, low[step], high[step])
            for step, value in record.curves["eval/knn"]
        ],
    )
