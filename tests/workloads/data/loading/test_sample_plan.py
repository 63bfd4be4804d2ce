"""The order of training: each image once an epoch, the same for every number of workers, sought without walking."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.sample_plan import epoch_order
from workloads.data.loading import sample_plan
from workloads.data.loading.sample_plan import SamplePlan, default_lanes
from workloads.errors import ConfigError

SHA = "0f" * 32


def make_plan(rows: list[int], global_batch_size: int, lanes: int | None = None, seed: int = 0) -> SamplePlan:
    return SamplePlan(np.array(rows), dataset_sha256=SHA, seed=seed, global_batch_size=global_batch_size, lanes=lanes)


def pairs(groups: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(groups.tolist(), rows.tolist(), strict=True))


def whole_epoch(plan: SamplePlan, epoch: int, world_size: int = 1) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for batch in range(plan.steps_per_epoch):
        for rank in range(world_size):
            positions, groups, rows = plan.share(epoch, batch, rank, world_size)
            assert not found.keys() & set(positions.tolist())
            found.update(zip(positions.tolist(), pairs(groups, rows), strict=True))
    return found


@st.composite
def plans(draw: st.DrawFn) -> tuple[SamplePlan, list[int]]:
    rows = draw(st.lists(st.integers(1, 12), min_size=1, max_size=60))
    lanes = draw(st.integers(1, min(9, sum(rows))))
    batch = lanes * draw(st.integers(1, max(1, min(6, sum(rows) // lanes))))
    return make_plan(rows, batch, lanes, seed=draw(st.integers(0, 2**31))), rows


@settings(max_examples=80, deadline=None)
@given(made=plans(), world_size=st.integers(1, 9), epoch=st.integers(0, 5))
def test_trained_and_remainder_are_each_row_once(made, world_size, epoch):
    plan, rows = made
    world_size = min(world_size, plan.lanes)
    trained = whole_epoch(plan, epoch, world_size)
    positions, groups, in_group = plan.remainder(epoch)
    assert sorted(trained) == list(range(plan.steps_per_epoch * plan.global_batch_size))
    assert positions.tolist() == list(range(len(trained), sum(rows)))
    every_row = [(g, r) for g, n in enumerate(rows) for r in range(n)]
    assert sorted([*trained.values(), *pairs(groups, in_group)]) == every_row


@settings(max_examples=60, deadline=None)
@given(made=plans(), block=st.sampled_from([1, 4, 1024]), epoch=st.integers(0, 3))
def test_plan_equals_the_obvious_walk(made, block, epoch):
    reference, rows = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_plan, "BLOCK_GROUPS", block)
        patch.setattr("tests.oracles.sample_plan.BLOCK_GROUPS", block)
        plan = SamplePlan(
            np.array(rows),
            dataset_sha256=SHA,
            seed=7,
            global_batch_size=reference.global_batch_size,
            lanes=reference.lanes,
        )
        order = epoch_order(rows, dataset_sha256=SHA, seed=7, lanes=plan.lanes, epoch=epoch)
        trained = whole_epoch(plan, epoch)
        _, groups, in_group = plan.remainder(epoch)
    assert [*(trained[g] for g in sorted(trained)), *pairs(groups, in_group)] == order


@settings(max_examples=60, deadline=None)
@given(made=plans(), data=st.data(), epoch=st.integers(0, 3))
def test_ranks_share_each_batch_whatever_their_number(made, data, epoch):
    plan, _ = made
    world_size = data.draw(st.integers(1, plan.lanes))
    batch = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    whole = plan.share(epoch, batch, 0, 1)
    shares = [plan.share(epoch, batch, rank, world_size) for rank in range(world_size)]
    joined = [np.concatenate(column) for column in zip(*shares, strict=True)]
    order = np.argsort(joined[0])
    for expected, found in zip(whole, joined, strict=True):
        np.testing.assert_array_equal(found[order], expected)
    sizes = [len(share[0]) for share in shares]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= plan.global_batch_size // plan.lanes
    for positions, _, _ in shares:
        assert np.all(np.diff(positions) > 0)


@settings(max_examples=60, deadline=None)
@given(made=plans(), data=st.data())
def test_only_groups_at_lane_borders_are_read_by_two_ranks(made, data):
    plan, _ = made
    world_size = data.draw(st.integers(1, plan.lanes))
    readers: dict[int, set[int]] = {}
    for rank in range(world_size):
        for batch in range(plan.steps_per_epoch):
            for group in plan.share(0, batch, rank, world_size)[1].tolist():
                readers.setdefault(group, set()).add(rank)
    # Each border between neighbouring ranks lies in at most one row group.
    shared = [ranks for ranks in readers.values() if len(ranks) > 1]
    assert sum(len(ranks) - 1 for ranks in shared) <= world_size - 1
    for ranks in shared:
        assert sorted(ranks) == list(range(min(ranks), max(ranks) + 1))


@settings(max_examples=40, deadline=None)
@given(made=plans(), data=st.data())
def test_seeking_equals_walking(made, data):
    plan, rows = made
    epoch, batch = data.draw(st.integers(0, 3)), data.draw(st.integers(0, plan.steps_per_epoch - 1))
    for walked_epoch in range(epoch + 1):
        whole_epoch(plan, walked_epoch)
    fresh = SamplePlan(
        np.array(rows),
        dataset_sha256=SHA,
        seed=int(plan._identity.split(":")[1]),
        global_batch_size=plan.global_batch_size,
        lanes=plan.lanes,
    )
    for walked, sought in zip(plan.share(epoch, batch, 0, 1), fresh.share(epoch, batch, 0, 1), strict=True):
        np.testing.assert_array_equal(walked, sought)


@settings(max_examples=40, deadline=None)
@given(made=plans(), data=st.data())
def test_open_groups_cover_the_batch(made, data):
    plan, _ = made
    world_size = data.draw(st.integers(1, plan.lanes))
    rank, batch = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, plan.steps_per_epoch - 1))
    needed = set(plan.share(0, batch, rank, world_size)[1].tolist())
    assert needed <= set(plan.open_groups(0, batch, rank, world_size).tolist())


def test_epochs_seeds_and_datasets_differ_and_so_do_remainders():
    rows = [10] * 41
    plan = make_plan(rows, 64)
    first, second = (list(whole_epoch(plan, epoch).values()) for epoch in (0, 1))
    assert first != second
    assert first != list(whole_epoch(make_plan(rows, 64, seed=1), 0).values())
    other = SamplePlan(np.array(rows), dataset_sha256="11" * 32, seed=0, global_batch_size=64)
    assert first != list(whole_epoch(other, 0).values())
    remainders = {tuple(pairs(*plan.remainder(epoch)[1:])) for epoch in range(4)}
    assert len(remainders) == 4


def test_rows_of_a_batch_come_from_all_over_the_dataset():
    plan = make_plan([20] * 500, 64)
    _, groups, _ = plan.share(0, 17, 0, 1)
    assert len(np.unique(groups)) >= 60


def test_order_is_pinned():
    """A change here changes every run's order: bump the plan on purpose, never by accident."""
    positions, groups, rows = make_plan([3, 4, 5], 4, 2).share(1, 1, 0, 1)
    assert positions.tolist() == [4, 5, 6, 7]
    assert pairs(groups, rows) == [(2, 3), (1, 3), (1, 0), (1, 2)]


@pytest.mark.parametrize(("batch", "lanes"), [(64, 64), (96, 48), (128, 64), (7, 7), (67, 1), (1, 1), (130, 26)])
def test_default_lanes(batch, lanes):
    assert default_lanes(batch) == lanes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_plan([5], 8), "only 5 images"),
        (lambda: make_plan([50], 8, lanes=3), "lanes=3"),
        (lambda: make_plan([50], 0), "at least 1"),
        (lambda: make_plan([50, 0], 8), "empty row group"),
        (lambda: make_plan([], 1), "only 0 images"),
        (lambda: make_plan([50], 8).share(0, 0, 0, 9), "9 workers"),
        (lambda: make_plan([50], 8).share(0, 6, 0, 1), "batch 6"),
        (lambda: make_plan([50], 8).share(0, 0, 2, 2), "rank 2"),
    ],
)
def test_numbers_that_cannot_work_are_refused_in_words(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_million_row_groups_are_sought_in_milliseconds():
    rows = np.full(1_000_000, 125, dtype=np.int32)
    plan = SamplePlan(rows, dataset_sha256=SHA, seed=0, global_batch_size=256)
    seeks = []
    for epoch, batch in ((0, 0), (3, 400_000), (1000, 77)):
        started = time.perf_counter()
        plan.share(epoch, batch, 0, 1)
        seeks.append(time.perf_counter() - started)
    # Loose on purpose: the machine may be busy; tests/benchmarks/loader.py measures.
    assert min(seeks) < 0.1
