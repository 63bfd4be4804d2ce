"""The cache is bounded, shared, and never hands out what it was not given."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.workloads.data.loading.test_loaders import make_loader, make_plan, take
from workloads.data.store.disk_cache import DiskCache
from workloads.data.store.row_groups import RowGroupReader


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_entries_are_shared_by_caches_of_one_folder(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1000)
    assert cache.get("a") is None
    cache.put("a", b"1" * 100)
    assert cache.get("a") == b"1" * 100
    assert DiskCache(tmp_path, max_bytes=1000).get("a") == b"1" * 100


def test_the_longest_unused_go_first(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1000)
    for index in range(8):
        cache.put(f"entry{index}", bytes(100))
        stamp = time.time() - 100 + index
        os.utime(cache._path(f"entry{index}"), (stamp, stamp))
    assert cache.get("entry0") is not None  # used just now
    for index in range(8, 12):
        cache.put(f"entry{index}", bytes(100))
    assert cache.get("entry0") is not None
    assert cache.get("entry1") is None
    assert size_of(tmp_path) <= 1000


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-3], lambda data: b"x" + data[1:], lambda data: bytes(len(data)), lambda _: b""]
)
def test_what_a_crash_left_is_not_handed_out(tmp_path, spoil):
    cache = DiskCache(tmp_path, max_bytes=1000)
    cache.put("a", b"sound bytes")
    path = cache._path("a")
    path.write_bytes(spoil(path.read_bytes()))
    assert cache.get("a") is None
    assert not path.exists()


def test_partial_files_of_the_dead_are_swept_those_of_the_living_stay(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1000)
    cache.put("a", b"1")
    old, new = (cache._path("a").with_name(f"{name}.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.sweep()
    assert not old.exists()
    assert new.exists()


WRITER = """
import sys
from workloads.data.store.disk_cache import DiskCache

cache, wrong = DiskCache(sys.argv[1], max_bytes=20_000), 0
for step in range(300):
    name = str((step * 7 + int(sys.argv[2])) % 40)
    found = cache.get(name)
    wrong += found not in (None, name.encode() * 500)
    cache.put(name, name.encode() * 500)
sys.exit(min(wrong, 1))
"""


def test_many_writers_never_see_each_others_halves(tmp_path):
    root = ROOT
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(seed)], cwd=root) for seed in (0, 10, 20)
    ]
    assert [writer.wait(100) for writer in writers] == [0, 0, 0]
    DiskCache(tmp_path, max_bytes=20_000).sweep()
    assert size_of(tmp_path) <= 20_000


def test_a_folder_that_cannot_be_written_is_only_slow(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file", max_bytes=1000)
    cache.put("a", b"1")
    assert cache.get("a") is None


def test_a_lock_that_cannot_be_opened_is_a_miss_and_the_folder_does_not_grow(tmp_path):
    (tmp_path / "lock").mkdir()  # nobody can open it for writing, not even root
    cache = DiskCache(tmp_path, max_bytes=1000)
    cache.put("a", b"1" * 100)
    assert cache.get("a") is None and size_of(tmp_path) == 0
    (tmp_path / "lock").rmdir()
    cache.put("a", b"1" * 100)
    assert cache.get("a") == b"1" * 100


def test_the_second_epoch_reads_no_shard(dataset, tmp_path, monkeypatch):
    plan = make_plan(dataset, 12)
    options = {"cache_dir": str(tmp_path), "prefetch_batches": 0}
    first = take(make_loader(dataset, plan, **options), plan.steps_per_epoch)
    monkeypatch.setattr(RowGroupReader, "_fetch", lambda *_: pytest.fail("was in the cache"))
    second = take(make_loader(dataset, plan, **options), plan.steps_per_epoch)
    assert [batch.image_ids for batch in first] == [batch.image_ids for batch in second]
    assert all(bool((one.images == two.images).all()) for one, two in zip(first, second, strict=True))
