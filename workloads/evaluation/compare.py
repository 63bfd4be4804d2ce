"""Runs of several objectives side by side: a table, loss and nearest neighbours over computing, and who gets where with how little.

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
from workloads.spec.factory import build_objective, render_views
from workloads.spec.pretrain import PretrainConfig
from workloads.types import ImageBatch

_PROBED = 2  # images of the step whose operations are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as its folder has it."""

    name: str
    settings: PretrainConfig
    curves: Mapping[str, list[tuple[int, float]]]  # metric → (step, value)
    hits: Mapping[int, Mapping[str, np.ndarray]]  # step → columns of the frozen-feature probe

    def last(self, metric: str) -> float | None:
        """The newest value, or None."""
        return self.curves[metric][-1][1] if metric in self.curves else None


def read_run(folder: Path) -> RunRecord:
    """A run of `python -m workloads train`, from its output folder.

    Raises:
        ConfigError: the folder holds no such run.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = next(iter(sorted((folder / "checkpoints").glob("step_*/config.yaml"))))
    except (OSError, StopIteration):
        raise ConfigError(f"{folder}: holds no finished run (metrics.jsonl and checkpoints)") from None
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in map(json.loads, lines):
        for metric, value in record.items():
            if metric not in ("step", "seconds"):
                curves.setdefault(metric, []).append((record["step"], value))
    settings = build(PretrainConfig, read_yaml(config))
    tables = (folder / "artifacts" / "report").glob("representation_step_*.npz")
    return RunRecord(name=folder.name, settings=settings, curves=curves, hits=read_hits(tables))


def read_hits(files: Iterable[Path]) -> dict[int, dict[str, np.ndarray]]:
    """The frozen-feature probe's tables, by step."""
    found = {}
    for file in files:
        with np.load(file, allow_pickle=False) as table:
            found[int(file.stem.rpartition("_")[2])] = {name: table[name] for name in table.files}
    return found


def flops_per_image(settings: PretrainConfig) -> float:
    """Floating-point operations of one image's forward and backward passes, multiplications and additions counted apart."""
    objective = build_objective(settings).train()
    size = settings.data.decode_size or 256
    batch = ImageBatch.of(
        torch.randint(0, 256, (_PROBED, 3, size, size), dtype=torch.uint8),
        regions=torch.ones((_PROBED, size, size), dtype=torch.int32),
        num_regions=1,
    )
    views = render_views(batch, settings)
    with FlopCounterMode(display=False) as counter:
        objective(views).loss.backward()
    return counter.get_total_flops() / _PROBED


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """A run's row."""

    record: RunRecord
    flops_per_image: float
    gains: Mapping[
        str, tuple[float, float, float]
    ]  # knn, linear → less the run's own untrained trunk, with 95 % interval
    computing_to_baseline: float | None  # share of the baseline's computing at which its final kNN is reached


def compare(records: list[RunRecord]) -> list[ComparedRun]:
    """The first run is the baseline.

    Raises:
        ConfigError: a run was not measured, or not by the first one's protocol.
    """
    protocols = {record.name: record.settings.evaluation.representation for record in records}
    for name, protocol in protocols.items():
        if protocol is None or not records[0].hits:
            raise ConfigError(f"{name}: was run without evaluation.representation, so there is nothing to compare")
        if config_hash(protocol) != config_hash(protocols[records[0].name]):
            raise ConfigError(f"{name}: was measured by another protocol than {records[0].name}; evaluate it again")
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
    """The step at which the kNN curve first comes to `goal`, between evaluations by straight lines."""
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
    test_images = int(first.last("eval/knn_images") or 0)
    lines = [
        f"kNN and linear probe: mean over classes, {test_images} images; chance {100 * (first.last('eval/knn_chance') or 0):.1f} %, "
        f"thumbnails without any network {100 * (first.last('eval/knn_pixel') or 0):.1f} %.",
        "",
        "| run | images trained on | GFLOPs an image | images/s | loss | kNN | over untrained, paired | linear | over untrained, paired "
        f"| computing to {first.name}'s kNN |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        record = row.record
        steps = record.settings.steps
        speed = np.median([value for _, value in record.curves["train/images_per_s"]])
        reached = "not reached" if row.computing_to_baseline is None else f"{row.computing_to_baseline:.2f} ×"
        cells = [
            record.name,
            f"{steps * record.settings.global_batch_size:,} in {steps} steps",
            f"{row.flops_per_image / 1e9:.2f}",
            f"{speed:.1f}",
            f"{record.curves['train/loss'][0][1]:.2f} → {record.last('train/loss'):.2f}",
            *(shown for name in ("knn", "linear") for shown in (_with_interval(record, name), _gain(row, name))),
            reached,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    """Write a PNG: each run's loss over images, and nearest neighbours over computing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        record, colour = row.record, f"C{number}"
        batch = record.settings.global_batch_size
        steps, losses = zip(*record.curves["train/loss"], strict=True)
        left.plot([step * batch for step in steps], np.array(losses) / losses[0], color=colour, label=record.name)
        points = record.curves["eval/knn"]
        low, high = (dict(record.curves[f"eval/knn_{end}"]) for end in ("low", "high"))
        x = [_computing(record, step, row.flops_per_image) / 1e12 for step, _ in points]
        y = [100 * value for _, value in points]
        right.plot(x, y, marker="o", markersize=4, color=colour, label=record.name)
        right.fill_between(
            x,
            [100 * low[step] for step, _ in points],
            [100 * high[step] for step, _ in points],
            color=colour,
            alpha=0.1,
        )
    first = rows[0].record
    for key, name in (("eval/knn_pixel", "thumbnails, no network"), ("eval/knn_chance", "chance")):
        right.axhline(100 * (first.last(key) or 0), color="0.5", linestyle=":" if "chance" in key else "--", label=name)
    left.set(
        xlabel="images",
        ylabel="loss, as a share of its first",
        title="Training loss (of different losses: shapes only)",
    )
    right.set(
        xlabel="TFLOPs spent on training",
        ylabel="nearest neighbours, mean over classes, %",
        title="What frozen features know (bands: 95 %)",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
