"""`Ledger`: records which images each step was trained on, per worker; `read_ledger` reads the surviving history."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from workloads.parallel.distributed import wait_for_all
from workloads.storage.filesystems import atomic_write
from workloads.types import ImageBatch


class Ledger:
    """One rank's record. A segment covers the steps since the last checkpoint and is written before the next checkpoint.

    So steps that a crash undoes are listed by the attempt that trained them last: the first line of
    `step_00000320/rank_0.jsonl` gives the number of ranks of that attempt.
    """

    def __init__(self, folder: str, *, rank: int, world_size: int) -> None:
        self._folder, self._rank, self._world_size = Path(folder), rank, world_size
        self._lines: list[dict[str, object]] = []

    def add(self, step: int, batch: ImageBatch) -> None:
        """Record one step's rows."""
        rows = zip(batch.image_ids, batch.positions.tolist(), batch.valid.tolist(), strict=True)
        trained: list[tuple[str, int]] = []
        undecodable: list[tuple[str, int]] = []
        for image_id, position, valid in rows:
            (trained if valid else undecodable).append((image_id, position))
        self._lines.append({"step": step, "epoch": batch.epoch, "trained": trained, "undecodable": undecodable})

    def close_segment(self, step: int) -> None:
        """Write the steps up to `step`; returns when all ranks have."""
        lines = [{"world_size": self._world_size}, *self._lines]
        path = (self._folder / f"step_{step:08d}" / f"rank_{self._rank}.jsonl").absolute()
        with atomic_write(pafs.LocalFileSystem(), str(path)) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._lines = []
        wait_for_all()


def read_ledger(folder: str | Path) -> Iterator[dict[str, object]]:
    """The lines (`step`, `epoch`, `trained`, `undecodable`) of the surviving history, in the order of the steps.

    A segment that begins within an earlier one replaces its end: the run went back to the checkpoint before.
    """
    steps: dict[int, list[dict[str, object]]] = {}
    for segment in sorted(Path(folder).glob("step_*")):
        if not (segment / "rank_0.jsonl").is_file():
            continue
        first = json.loads((segment / "rank_0.jsonl").read_text().splitlines()[0])
        covered: dict[int, list[dict[str, object]]] = {}
        for rank in range(first["world_size"]):
            for text in (segment / f"rank_{rank}.jsonl").read_text().splitlines()[1:]:
                line = json.loads(text)
                covered.setdefault(line["step"], []).append(line)
        steps |= covered
    for step in sorted(steps):
        yield from steps[step]
