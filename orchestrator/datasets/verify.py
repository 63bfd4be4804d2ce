"""Checking and describing a dataset that was built: every byte again, or a page about it."""

import csv
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.build.region_masks import PREFIX, RegionsError, decode_regions
from workloads.data.loading.decode import DecodeError, decode_image
from workloads.data.loading.loaders import read_annotations
from workloads.data.store.manifest import Dataset, FileEntry, open_dataset
from workloads.data.store.row_groups import check_regions, region_columns
from workloads.reports.region_overlays import draw_region_overlays
from workloads.storage.filesystems import DataError, read_bytes

Progress = Callable[[int, int], None]

_CHUNK = 8 << 20


@dataclass(slots=True)
class VerifyReport:
    """What `verify_dataset` found."""

    num_images: int
    decoded: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.faults:
            shown = "\n".join(self.faults[:20])
            more = f"\n… and {len(self.faults) - 20} more" if len(self.faults) > 20 else ""
            return f"{len(self.faults)} faults:\n{shown}{more}"
        return f"sound: {self.num_images} images, every hash as listed, {self.decoded} decoded"


def verify_dataset(
    uri: str, *, progress: Progress | None = None, decode_share: float = 1.0, raise_on_fault: bool = True
) -> VerifyReport:
    """Read a dataset's files again: SHA-256, row counts, unique ids, and whether images decode.

    Args:
        decode_share: share of the images to decode, chosen by a hash of their ids.

    Raises:
        DataError: a fault was found (all of them are in the message); or there is no dataset.
    """
    dataset = open_dataset(uri)
    report = VerifyReport(num_images=dataset.num_images)
    ids: Counter[str] = Counter()
    done = 0
    _check_hash(dataset, dataset.manifest.rejects, report)
    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        for number, shard in enumerate(dataset.manifest.shards):
            if _check_hash(dataset, shard, report):
                ids.update(_check_rows(dataset, number, decode_share, pool, report))
            done += shard.rows
            if progress is not None:
                progress(done, dataset.num_images)
    report.faults += [f"image id {name!r} stands {count} times" for name, count in ids.items() if count > 1]
    if report.faults and raise_on_fault:
        raise DataError(f"{uri}: {report}; restore the files named or build again")
    return report


def _check_hash(dataset: Dataset, entry: FileEntry, report: VerifyReport) -> bool:
    digest = hashlib.sha256()
    try:
        with dataset.filesystem.open_input_stream(f"{dataset.root}/{entry.name}") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        report.faults.append(f"{entry.name}: cannot be read ({error})")
        return False
    if digest.hexdigest() != entry.sha256:
        report.faults.append(f"{entry.name}: does not match its SHA-256")
        return False
    return True


def _check_rows(
    dataset: Dataset, shard: int, decode_share: float, pool: ThreadPoolExecutor, report: VerifyReport
) -> list[str]:
    """The shard's image ids; faults go to the report."""
    entry, ids = dataset.manifest.shards[shard], []
    first = int(dataset.row_groups.first[shard])
    try:
        with dataset.filesystem.open_input_file(dataset.shard_path(shard)) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if parquet.metadata.num_rows != entry.rows:
                report.faults.append(f"{entry.name}: has {parquet.metadata.num_rows} rows, not {entry.rows}")
            for group in range(parquet.num_row_groups):
                masks = [name for name in parquet.schema_arrow.names if name.startswith(PREFIX)]
                table = parquet.read_row_group(group, columns=["image", "image_id", "width", "height", *masks])
                if len(table) != int(dataset.row_groups.rows[first + group]):
                    report.faults.append(f"{entry.name}: row group {group} has {len(table)} rows, unlike the index")
                ids += table["image_id"].to_pylist()
                _check_images(entry.name, table, decode_share, pool, report)
    except (OSError, pa.ArrowException, IndexError) as error:
        report.faults.append(f"{entry.name}: cannot be read ({' '.join(str(error).split())})")
    return ids


def _check_images(
    name: str, table: pa.Table, decode_share: float, pool: ThreadPoolExecutor, report: VerifyReport
) -> None:
    rows = [
        row
        for row in table.to_pylist()
        if int.from_bytes(hashlib.sha256(row["image_id"].encode()).digest()[:8], "big") < decode_share * 2**64
    ]
    for row, reason in zip(rows, pool.map(_fault_of, rows), strict=True):
        report.decoded += 1
        if reason is not None:
            report.faults.append(f"{name}: image {row['image_id']!r} {reason}")


def _fault_of(row: dict[str, Any]) -> str | None:
    """What is wrong with the pixels or the masks of one row."""
    if row["image"]["bytes"] is None:
        return "has no bytes"
    try:
        decode_image(row["image"]["bytes"])
        for column, mask in row.items():
            if column.startswith(PREFIX) and mask is not None:
                ids = decode_regions(mask["bytes"])
                if ids.shape != (row["height"], row["width"]):
                    return f"has {column} of {ids.shape[1]}x{ids.shape[0]} pixels"
    except DecodeError as error:
        return f"does not decode ({error})"
    except RegionsError as error:
        return f"has an unreadable mask ({error})"
    return None


def draw_regions(uri: str, target: str, *, name: str | None = None, count: int = 8) -> Path:
    """Draw the first `count` images of the dataset at `uri` with their region masks, those of column `name` or all.

    Raises:
        DataError: no dataset there, or it has no such regions.
    """
    dataset = open_dataset(uri)
    names = [name] if name is not None else region_columns(dataset)
    for column in names or [""]:
        check_regions(dataset, column)
    rows: list[tuple[str, np.ndarray, dict[str, np.ndarray | None]]] = []
    with dataset.filesystem.open_input_file(dataset.shard_path(0)) as file:
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(count, columns=["image", "image_id", *(PREFIX + n for n in names)]):
            for row in batch.to_pylist()[: count - len(rows)]:
                masks = {n: row[PREFIX + n] for n in names}
                decoded = {n: None if mask is None else decode_regions(mask["bytes"]) for n, mask in masks.items()}
                pixels = decode_image(row["image"]["bytes"]).permute(1, 2, 0).numpy()
                rows.append((row["image_id"], pixels, decoded))
            if len(rows) == count:
                break
    draw_region_overlays(rows, Path(target))
    return Path(target)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStats:
    """Counts and distributions of a dataset."""

    uri: str
    sha256: str
    num_images: int
    num_bytes: int
    num_shards: int
    num_row_groups: int
    row_group_bytes: tuple[int, int, int]  # least, median, largest
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
            f"{least / 1024:,.0f} / {median / 1024:,.0f} / {largest / 1024:,.0f} KiB (least/median/largest)",
        )
        yield (
            "size",
            f"{width}x{height} median, longer side {self.sizes_hw.max(1).min()} to {self.sizes_hw.max()} pixels",
        )
        yield "mean, std", f"{_numbers(self.channel_mean)}, {_numbers(self.channel_std)} (RGB, of 1)"
        yield "classes", _most(self.labels)
        yield "objects", _most(self.categories)
        yield "rejects", _most(self.rejects)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _most(counts: Counter[str]) -> str:
    if not counts:
        return "none"
    named = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(5))
    more = f", {len(counts) - 5} more" if len(counts) > 5 else ""
    return f"{counts.total():,} of {len(counts)} kinds: {named}{more}"


def dataset_stats(uri: str) -> DatasetStats:
    """Counts, sizes and rejects of a dataset; reads all columns but the images.

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
    """Keep the table and the figure with an MLflow run, under `report/data/`; returns the run's id.

    Raises:
        ConfigError: no such run or tracking store.
    """
    from orchestrator.results.evaluate import find_run, open_tracking
    from orchestrator.tracking.sink import dataset_label

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
