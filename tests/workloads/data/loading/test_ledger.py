"""The ledger's surviving history, over crashes and changes of the number of ranks."""

import json

import torch

from workloads.data.loading.ledger import Ledger, read_ledger
from workloads.types import ImageBatch


def batch_of(*rows: tuple[str, int, bool], epoch: int = 0) -> ImageBatch:
    n = len(rows)
    hw = torch.ones(n, 2, dtype=torch.int64)
    return ImageBatch(
        images=torch.zeros(n, 3, 1, 1, dtype=torch.uint8),
        content_hw=hw,
        source_hw=hw,
        image_ids=tuple(row[0] for row in rows),
        positions=torch.tensor([row[1] for row in rows]),
        valid=torch.tensor([row[2] for row in rows]),
        epoch=epoch,
    )


def trained(folder) -> list[tuple[int, list[str]]]:
    return [(line["step"], [image for image, _ in line["trained"]]) for line in read_ledger(folder)]


def test_what_a_crash_undid_is_listed_once(tmp_path):
    first = Ledger(str(tmp_path), rank=0, world_size=1)
    first.add(1, batch_of(("a", 0, True), ("b", 1, False)))
    first.add(2, batch_of(("c", 2, True)))
    first.close_segment(2)
    first.add(3, batch_of(("lost", 3, True)))  # trained, but undone by a crash before the next checkpoint
    again = Ledger(str(tmp_path), rank=0, world_size=1)
    again.add(3, batch_of(("d", 3, True)))
    again.close_segment(3)
    assert trained(tmp_path) == [(1, ["a"]), (2, ["c"]), (3, ["d"])]
    assert next(read_ledger(tmp_path))["undecodable"] == [["b", 1]]


def test_a_segment_is_that_of_the_attempt_that_wrote_it_last(tmp_path):
    """Two ranks write a segment, but their checkpoint never becomes whole; one rank trains the steps again."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for rank in (0, 1):
        line = {"step": 1, "epoch": 0, "trained": [[f"stale {rank}", rank]], "undecodable": []}
        (folder / f"rank_{rank}.jsonl").write_text(json.dumps({"world_size": 2}) + "\n" + json.dumps(line) + "\n")
    alone = Ledger(str(tmp_path), rank=0, world_size=1)
    alone.add(1, batch_of(("x", 0, True), ("y", 1, True)))
    alone.close_segment(1)
    assert trained(tmp_path) == [(1, ["x", "y"])]


def test_a_segment_that_begins_within_an_earlier_one_replaces_its_end(tmp_path):
    early = Ledger(str(tmp_path), rank=0, world_size=1)
    early.add(1, batch_of(("a", 0, True)))
    early.add(2, batch_of(("b", 1, True)))
    early.close_segment(2)  # asked for, and its checkpoint was never whole
    later = Ledger(str(tmp_path), rank=0, world_size=1)
    for step, image in ((1, "a"), (2, "b"), (3, "c")):
        later.add(step, batch_of((image, step - 1, True)))
    later.close_segment(3)
    assert trained(tmp_path) == [(1, ["a"]), (2, ["b"]), (3, ["c"])]
