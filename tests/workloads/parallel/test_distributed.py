"""Collectives over real ranks, also where the default group carries no tensor of the host, as one made for NCCL."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.processes import DEVICE_ONLY, run_on_ranks
from workloads.parallel.distributed import (
    averaged,
    from_rank_0,
    gather_rows,
    largest_over_ranks,
    row_counts,
    sum_over_ranks,
    wait_for_all,
)
from workloads.parallel.runtime import agreed, averaging_gradients


def exchange(rank: int, world_size: int) -> dict[str, object]:
    rows = torch.full((rank, 2), float(rank), requires_grad=True)
    gathered = gather_rows(rows)
    (gathered.sum() * (rank + 1)).backward()
    wait_for_all()
    model = averaging_gradients(nn.Linear(1, 1, bias=False), torch.device("cpu"), world_size)
    model(torch.full((1, 1), float(rank))).sum().backward()
    try:
        dist.all_reduce(torch.zeros(1))
        refused = False
    except RuntimeError:
        refused = True
    return {
        "refused": refused,
        "counts": [row_counts(rank), row_counts(rank + 1)],
        "rows": gathered.tolist(),
        "gradient": rows.grad.tolist() if rows.grad is not None else None,
        "weight": [p.grad.item() for p in model.parameters() if p.grad is not None],
        "flags": gather_rows(torch.tensor([rank == 1])).tolist(),
        "largest": largest_over_ranks(rank),
        "agreed": agreed("save" if rank == 1 else "go on"),
        "first": from_rank_0({"of": rank}),
        "sum": float(sum_over_ranks(torch.tensor(1.0))),
        "mean": float(averaged({"x": (torch.tensor(float(rank)), torch.tensor(1))})["x"]),
    }


@pytest.mark.parametrize("backend", ["gloo", DEVICE_ONLY])
def test_collectives_of_host_tensors(tmp_path: Path, backend: str):
    for rank, found in enumerate(run_on_ranks(exchange, 3, tmp_path, backend=backend)):
        assert found["refused"] == (backend == DEVICE_ONLY)
        assert found["counts"] == [[0, 1, 2], [1, 2, 3]]
        assert found["rows"] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert found["gradient"] == [[6.0, 6.0]] * rank  # 1 + 2 + 3, of every rank that used the row
        assert found["weight"] == [1.0]
        assert found["flags"] == [False, True, False]
        assert (found["largest"], found["agreed"], found["first"]) == (2, "save", {"of": 0})
        assert (found["sum"], found["mean"]) == (3.0, 1.0)


def test_one_process_exchanges_nothing():
    assert row_counts(5) == [5]
    assert agreed("stop") == "stop"
    assert from_rank_0("x") == "x"
