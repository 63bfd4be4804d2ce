"""Checking and describing a dataset that was built: every byte again, or a page about it."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.loading.decode import DecodeError, decode_image
from workloads.data.store.manifest import Dataset, FileEntry, open_dataset
from workloads.data.store.region_codec import PREFIX, RegionsError, decode_regions
from workloads.errors import DataError

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
