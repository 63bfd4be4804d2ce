"""Verifies datasets: `verify_dataset` reads every file again and checks hashes, row counts, ids, images and region masks."""

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
"""Called with (images checked, images in total)."""

_CHUNK = 8 << 20


@dataclass(slots=True)
class VerifyReport:
    """Counts and faults of one dataset; as text, one line, or the first 20 faults."""

    num_images: int
    decoded: int = 0  # images whose pixels were decoded
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.faults:
            shown = "\n".join(self.faults[:20])
            more = f"\n… and {len(self.faults) - 20} more" if len(self.faults) > 20 else ""
            return f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}:\n{shown}{more}"
        return f"sound: {self.num_images} images, every hash as listed, {self.decoded} decoded"


def verify_dataset(uri: str, *, progress: Progress | None = None, decode_share: float = 1.0) -> VerifyReport:
    """Read all files of a dataset again and check SHA-256, row counts, unique ids, and whether images decode.

    Args:
        decode_share: share of the images to decode, chosen by a hash of their ids.

    Raises:
        DataError: there are faults (the message lists them), or there is no dataset.
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
    report.faults += [f"image id {name!r} occurs {count} times" for name, count in ids.items() if count > 1]
    if report.faults:
        raise DataError(f"{uri}: {report}; restore the files named, or build again")
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
    """The image ids of a shard; faults are added to the report."""
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
                indexed = int(dataset.row_groups.rows[first + group])
                if len(table) != indexed:
                    report.faults.append(
                        f"{entry.name}: row group {group} has {len(table)} rows, the index says {indexed}"
                    )
                ids += table["image_id"].to_pylist()
                _check_images(entry.name, table, decode_share, pool, report)
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:  # a damaged footer raises several
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
    """Why the pixels or the masks of one row cannot be used, or None."""
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
