"""Describes a dataset: `dataset_stats` counts images, sizes and rejects, `draw_stats` draws them, `log_stats` logs them to MLflow."""

import csv
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import Dataset, FileEntry, open_dataset
from workloads.storage.filesystems import read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStats:
    """Counts and distributions of a dataset; as text, a table of one line each."""

    uri: str
    sha256: str
    num_images: int
    num_bytes: int
    num_shards: int
    num_row_groups: int
    row_group_bytes: tuple[int, int, int]  # smallest, median, largest
    source: dict[str, Any]
    channel_mean: list[float]
    channel_std: list[float]
    sizes_hw: np.ndarray  # int (n, 2), pixels
    labels: Counter[str]
    categories: Counter[str]
    rejects: Counter[str]  # by reason, without its details

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {value}" for name, value in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        least, median, largest = self.row_group_bytes
        height, width = np.median(self.sizes_hw, axis=0).astype(int)
        yield "dataset", f"{self.uri} (manifest {self.sha256[:12]}, source {self.source.get('kind')})"
        yield "images", f"{self.num_images:,} in {self.num_shards:,} shards and {self.num_row_groups:,} row groups"
        yield "bytes", f"{self.num_bytes / 2**20:,.1f} MiB, {self.num_bytes / self.num_images / 1024:,.1f} KiB an image"
        yield (
            "row groups",
            f"{least / 1024:,.0f} / {median / 1024:,.0f} / {largest / 1024:,.0f} KiB (smallest/median/largest)",
        )
        yield (
            "size",
            f"{width}x{height} median, longer side {self.sizes_hw.max(1).min()} to {self.sizes_hw.max()} pixels",
        )
        yield "mean, std", f"{_numbers(self.channel_mean)}, {_numbers(self.channel_std)} (RGB, 0 to 1)"
        yield "classes", _most_common(self.labels)
        yield "objects", _most_common(self.categories)
        yield "rejects", _most_common(self.rejects)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _most_common(counts: Counter[str]) -> str:
    if not counts:
        return "none"
    named = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(5))
    more = f", {len(counts) - 5} more" if len(counts) > 5 else ""
    return f"{counts.total():,} of {len(counts)} kinds: {named}{more}"


def dataset_stats(uri: str) -> DatasetStats:
    """Count the images, sizes, classes, objects and rejects of a dataset; reads all columns except the images.

    Raises:
        DataError: there is no dataset, or a file of it cannot be read.
    """
    dataset = open_dataset(uri)
    annotations = read_annotations(dataset).values()
    lengths = dataset.row_groups.length
    rejects = pq.read_table(pa.BufferReader(read_bytes(dataset.filesystem, _path(dataset, dataset.manifest.rejects))))
    statistics = dataset.manifest.statistics
    return DatasetStats(
        uri=uri,
        sha256=dataset.manifest.sha256,
        num_images=dataset.num_images,
        num_bytes=dataset.manifest.num_bytes,
        num_shards=len(dataset.manifest.shards),
        num_row_groups=len(dataset.row_groups),
        row_group_bytes=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
        source=dict(dataset.manifest.source),
        channel_mean=statistics.get("channel_mean", []),
        channel_std=statistics.get("channel_std", []),
        sizes_hw=np.array([item.size_hw for item in annotations]),
        labels=Counter(item.label for item in annotations if item.label is not None),
        categories=Counter(name for item in annotations for name in item.categories),
        rejects=Counter(reason.partition(":")[0] for reason in rejects["reason"].to_pylist()),
    )


def _path(dataset: Dataset, entry: FileEntry) -> str:
    return f"{dataset.root}/{entry.name}"


def draw_stats(stats: DatasetStats, path: str | Path) -> Path:
    """Draw image sizes, longer sides, classes or objects, and rejects as one PNG; returns its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{stats.num_images:,} images, manifest {stats.sha256[:12]}")
    shown = stats.sizes_hw[:: max(1, len(stats.sizes_hw) // 20_000)]
    axes[0, 0].scatter(shown[:, 1], shown[:, 0], s=3, alpha=0.3)
    axes[0, 0].set(title="size", xlabel="width, pixels", ylabel="height, pixels")
    axes[0, 1].hist(stats.sizes_hw.max(axis=1), bins=40)
    axes[0, 1].set(title="longer side", xlabel="pixels", ylabel="images")
    counts, title = (stats.labels, "classes") if stats.labels else (stats.categories, "objects")
    _draw_bars(axes[1, 0], counts, title)
    _draw_bars(axes[1, 1], stats.rejects, "rejects")
    figure.savefig(path, dpi=110)
    return Path(path)


def _draw_bars(axis: Any, counts: Counter[str], title: str) -> None:
    axis.set_title(f"{title}: {counts.total():,}" if counts else f"{title}: none")
    if not counts:
        axis.axis("off")
        return
    names, values = zip(*counts.most_common(15), strict=True)
    axis.barh(range(len(names)), values)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()


def log_stats(stats: DatasetStats, run: str, *, tracking_uri: str | None = None) -> str:
    """Add the table and the figure to an MLflow run, as artifacts under `report/data/`; returns the run's id.

    Raises:
        ConfigError: no such run or tracking store.
    """
    from orchestrator.tracking.header import dataset_label
    from orchestrator.tracking.lookup import find_run, open_tracking

    client = open_tracking(tracking_uri)
    run_id = str(find_run(client, run).info.run_id)
    with tempfile.TemporaryDirectory() as folder:
        label = dataset_label(stats.uri)
        draw_stats(stats, Path(folder, f"{label}.png"))
        rows = [("", "images", stats.num_images), *(("label", *pair) for pair in sorted(stats.labels.items()))]
        rows += [("reject", *pair) for pair in sorted(stats.rejects.items())]
        with Path(folder, f"{label}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("kind", "name", "count"), *rows])
        Path(folder, f"{label}.txt").write_text(str(stats).replace(stats.uri, label) + "\n", encoding="utf-8")
        client.log_artifacts(run_id, folder, "report/data")
    return run_id
