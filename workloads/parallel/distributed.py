"""Collectives over all ranks: gathers and sums with gradient, host-side exchange, and the process group that each must use.

A group made by `init_process_group("nccl")` carries GPU tensors only. So each collective takes its group from where its tensor
lies (`group_for`): GPU tensors use the default group, tensors on the host a gloo group of the same ranks. The loss and its
gradient are the same on any number of ranks.
"""

import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_for(device: torch.device | str) -> dist.ProcessGroup | None:
    """The process group that carries tensors of `device`; None is the default group.

    Every rank must make its first call for the host at the same point, since that creates the group.
    """
    return _host_group() if torch.device(device).type == "cpu" else None


# Weak, because a group that outlives its default group has threads that outlive the interpreter, which aborts.
_host_groups: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _host_group() -> dist.ProcessGroup | None:
    """The group of all ranks for tensors on the host: the default one if it carries them, else a gloo group, made once."""
    if world_size() == 1 or "cpu:" in dist.get_backend_config():
        return None
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups[world] = dist.new_group(backend="gloo")
    group: dist.ProcessGroup = _host_groups[world]
    return group


def wait_for_all() -> None:
    """Return when every rank has made this call; does not wait for what the GPUs have queued."""
    if world_size() > 1:
        dist.barrier(group=_host_group())


def row_counts(rows: int) -> list[int]:
    """The number of rows that each rank holds, in rank order, exchanged between the hosts so that no rank waits for its GPU."""
    if world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64), group=_host_group())
    return [int(count) for count in counts]


def largest_over_ranks(value: int) -> int:
    """The largest `value` of any rank, exchanged between the hosts."""
    if world_size() == 1:
        return value
    largest = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_host_group())
    return int(largest)


def from_rank_0(value: T) -> T:
    """Rank 0's `value` on every rank, exchanged between the hosts; it is pickled, so keep it small and plain."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host_group())
    return values[0]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order; the gradient of a rank's rows is summed over all ranks that used them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group_for(rows.device))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A copy: what autograd hands over may be used elsewhere too.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group_for(total.device))
        first = sum(ctx.counts[: dist.get_rank()])
        return total[first : first + ctx.counts[dist.get_rank()]], None


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Rows (n_r, ...) of every rank, concatenated in rank order, with gradient; n_r may differ between ranks.

    Args:
        rows: on the GPU or the host, the same on every rank; dtype and trailing dimensions too.
        counts: the result of `row_counts`, where several tensors of the same rows are gathered.
    """
    if world_size() == 1:
        return rows
    counts = row_counts(rows.shape[0]) if counts is None else counts
    if not rows.is_floating_point():
        # Not every backend carries bool; int64 loses nothing.
        gathered: Tensor = _GatherRows.apply(rows.to(torch.int64), counts)
        return gathered.to(rows.dtype)
    return _GatherRows.apply(rows, counts)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group_for(total.device))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total, group=group_for(total.device))
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, with gradient: each rank's gradient is the sum of all ranks' gradients of the total."""
    return value if world_size() == 1 else _SumOverRanks.apply(value)


def global_mean(local_sum: Tensor, local_count: Tensor) -> Tensor:
    """A local sum as this rank's part of the global mean, times the number of ranks.

    DDP averages gradients over W ranks, so the part is multiplied by W: mean_r(W · s_r / n) = Σ s_r / n.
    """
    count = sum_over_ranks(local_count.detach().to(local_sum.dtype))
    return local_sum * (world_size() / count.clamp(min=1))


def averaged(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Global means of `{name: (local sum, local count)}` in one all-reduce, detached scalars."""
    if not metrics:
        return {}
    table = torch.stack([torch.stack([s.detach().float(), c.detach().float()]) for s, c in metrics.values()])
    total = sum_over_ranks(table)
    means = total[:, 0] / total[:, 1].clamp(min=1)
    return dict(zip(metrics, means.unbind(), strict=True))
