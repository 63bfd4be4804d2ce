"""Row groups are read by many threads, and the reader holds a bounded number of open files."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.datasets.build import build_dataset
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.store import row_groups
from workloads.data.store.manifest import open_dataset
from workloads.data.store.row_groups import RowGroupReader


def open_shards(folder: Path) -> int:
    paths = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(path.startswith(str(folder)) for path in paths)


def test_files_beyond_the_limit_are_closed_when_their_last_reader_is_done(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "_OPEN_SHARDS", 2)
    source = FolderSourceConfig(inputs=(str(folder),))
    build_dataset(BuildConfig(source=source, output=str(tmp_path), rows_per_shard=4, row_group_bytes=2000))
    dataset = open_dataset(str(tmp_path))
    reader = RowGroupReader(dataset)
    everything = range(len(dataset.row_groups))
    with ThreadPoolExecutor(4) as pool:
        rows = sum(len(group.image_ids) for group in pool.map(reader.read, [*everything, *everything]))
    assert rows == 2 * dataset.num_images and len(dataset.manifest.shards) > 4
    assert open_shards(tmp_path) <= 2
