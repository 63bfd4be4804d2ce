"""Row groups are read by many threads, and the reader holds a bounded number of open files."""

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.datasets.build import build_dataset
from tests.workloads.data.images import make_folder
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.store import row_groups
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset
from workloads.data.store.row_groups import RowGroupReader
from workloads.errors import DataError


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


def test_a_damaged_shard_is_a_data_error_whatever_was_hit(tmp_path):
    """Footers and page headers have no checksum: damage there makes other columns, ids that are no text, or worse."""
    source = FolderSourceConfig(inputs=(str(make_folder(tmp_path / "images", classes=1, per_class=6)),))
    build_dataset(BuildConfig(source=source, output=str(tmp_path / "shards"), row_group_bytes=4000))
    dataset = open_dataset(str(tmp_path / "shards"))
    path = Path(dataset.shard_path(0))
    sound = path.read_bytes()
    begins = dataset.row_groups.offset.tolist()
    outcomes = Counter()
    for seed in range(400):
        rng, data = random.Random(seed), bytearray(sound)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.choice([len(data) - rng.randrange(9, 3000), rng.choice(begins) + rng.randrange(60)])
            data[place] = rng.randrange(256)
        names = data.find(b"image_id", begins[-1])  # in the schema, and then an id within a page
        if seed % 40 == 0:
            data[names] ^= 1
        path.write_bytes(data)
        try:
            RowGroupReader(dataset).read(0)
            read_annotations(dataset)
            outcomes["read"] += 1
        except DataError as error:
            assert "shard-000000.parquet: cannot be read" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20
