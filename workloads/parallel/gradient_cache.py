"""Computes the exact gradients of a global batch whose share does not fit in memory, by gradient caching (arXiv 2101.06983).

Three passes: embeddings of all images in micro-batches, without a graph; the loss and its gradient with respect to the
embeddings; each micro-batch again with its graph, backward from the gradients of its embeddings.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.parallel.distributed import group_for
from workloads.types import PairViews, StepResult, Views

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def backward_in_micro_batches(objective: nn.Module, views: Views | PairViews, micro_batch_size: int) -> StepResult:
    """Add the gradient of the global-batch loss, averaged over ranks, to `objective`'s parameters; returns the detached step.

    The second forward pass draws the same random numbers as the first, and updates no running statistics.

    Args:
        objective: computes `loss(embed(views), views)`; not wrapped in DDP, because gradients are averaged here.
        micro_batch_size: images of this rank that have a graph at the same time.
    """
    parts = [slice(i, i + micro_batch_size) for i in range(0, views.valid.shape[0], micro_batch_size)]
    device = views.valid.device
    states, pieces = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_rng_state(device))
            pieces.append(objective.embed(views.rows(part)))  # type: ignore[operator]
    after = _rng_state(device)
    leaves = {name: torch.cat([piece[name] for piece in pieces]).detach().requires_grad_() for name in pieces[0]}
    del pieces
    result: StepResult = objective.loss(leaves, views)  # type: ignore[operator]
    result.loss.backward()
    with _without_tracking(objective):
        for part, state in zip(parts, states, strict=True):
            _set_rng_state(state, device)
            again = objective.embed(views.rows(part))  # type: ignore[operator]
            names = [name for name in again if leaves[name].grad is not None]
            torch.autograd.backward([again[n] for n in names], [leaves[n].grad[part] for n in names])  # type: ignore[index]
    _set_rng_state(after, device)
    _average_gradients(objective)
    return StepResult(loss=result.loss.detach(), metrics=result.metrics)


def _average_gradients(module: nn.Module) -> None:
    """Average the gradients over ranks, as DDP does, in one all-reduce."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group_for(flat.device))
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@contextlib.contextmanager
def _without_tracking(module: nn.Module) -> Iterator[None]:
    tracking = [m for m in module.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
