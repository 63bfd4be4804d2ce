"""Reductions over the global batch: the loss and its gradient are the same on any number of ranks."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank holds, in rank order.

    Ranks tell each other over the host's network, so that no rank waits here for what its GPU has queued; `device` is where the
    rows are.
    """
    if world_size() == 1:
        return [rows]
    group = _host_group() if device.type != "cpu" else None
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64), group=group)
    return [int(count) for count in counts]


# Weak, because a group that outlives its world has threads that outlive the interpreter, which aborts.
_host_groups: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _host_group() -> Any:
    """All ranks once more, for tensors on the host; made at the first use, by every rank at the same place."""
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order; the gradient of a rank's rows is summed over all ranks that used them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first = sum(ctx.counts[: dist.get_rank()])
        return total[first : first + ctx.counts[dist.get_rank()]], None


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Rows (n_r, ...) of every rank, concatenated in rank order, with gradient; uneven n_r are allowed.

    Args:
        counts: what `row_counts` returned, where several tensors of the same rows are gathered.
    """
    if world_size() == 1:
        return rows
    counts = row_counts(rows.shape[0], rows.device) if counts is None else counts
    if not rows.is_floating_point():
        # Not every backend carries bool; int64 loses nothing.
        gathered: Tensor = _GatherRows.apply(rows.to(torch.int64), counts)
        return gathered.to(rows.dtype)
    return _GatherRows.apply(rows, counts)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, with gradient: each rank's gradient is the sum of what all ranks ask of the total."""
    return value if world_size() == 1 else _SumOverRanks.apply(value)


def global_mean(local_sum: Tensor, local_count: Tensor) -> Tensor:
    """A local sum as this rank's part of the global mean, times the number of ranks.

    DDP averages gradients over W ranks, so the part is multiplied by W: mean_r(W · s_r / n) = Σ s_r / n.
    """
    count = sum_over_ranks(local_count.detach().to(local_sum.dtype))
    return local_sum * (world_size() / count.clamp(min=1))


def averaged(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Global means of `{name: (local sum, local count)}` in one all-reduce, detached."""
    if not metrics:
        return {}
    table = torch.stack([torch.stack([s.detach().float(), c.detach().float()]) for s, c in metrics.values()])
    total = sum_over_ranks(table)
    means = total[:, 0] / total[:, 1].clamp(min=1)
    return dict(zip(metrics, means.unbind(), strict=True))
