"""What ranks tell each other of the rows they hold."""

from pathlib import Path

import torch

from tests.processes import run_on_ranks
from workloads.parallel.distributed import gather_rows, row_counts


def tell(rank: int, world_size: int) -> dict[str, object]:
    # A GPU's rows are counted on the host: no CUDA device is needed for that, nor waited for.
    counts = [row_counts(rank + step, torch.device(device)) for device in ("cpu", "cuda") for step in range(2)]
    return {"counts": counts, "rows": gather_rows(torch.full((rank, 2), float(rank))).tolist()}


def test_rows_are_counted_on_the_host(tmp_path: Path):
    for told in run_on_ranks(tell, 3, tmp_path):
        assert told["counts"] == [[0, 1, 2], [1, 2, 3]] * 2
        assert told["rows"] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]


def test_one_process_asks_nobody():
    assert row_counts(5, torch.device("cuda")) == [5]
