"""EMA target networks (`target_of`, `follow`) and the queue of their keys (`KeyQueue`, MoCo)."""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

M = TypeVar("M", bound=nn.Module)


def target_of(online: M) -> M:
    """A copy of `online` without gradients, whose moving average `follow` maintains."""
    return copy.deepcopy(online).requires_grad_(False)


def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target ← momentum · target + (1 − momentum) · online; buffers, such as running statistics, are not averaged."""
    targets: list[Tensor] = list(target.parameters())
    get_ema_multi_avg_fn(momentum)(targets, list(online.parameters()), None)


def cosine_momentum(start: float, step: int, steps: int) -> float:
    """1 − (1 − start) · ½ (1 + cos πk/K): from `start` at step 0 to 1 at the end (arXiv 2006.07733, section 3.2)."""
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


class KeyQueue(nn.Module):
    """The newest keys of earlier steps, first in first out, the same on every rank and stored with the checkpoint.

    Nothing here waits for the device: the number of valid keys differs between steps and is known to the device alone.
    """

    keys: Tensor
    cursor: Tensor
    count: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        # One row more than the size: invalid keys are written there.
        self.register_buffer("keys", torch.zeros(size + 1, channels))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        """The largest number of keys."""
        return self.keys.shape[0] - 1

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys (size, C) and which rows hold one, bool (size,)."""
        places = torch.arange(self.size, device=self.keys.device)
        return self.keys[:-1], places < self.count

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor) -> None:
        """Replace the oldest keys by the valid ones of the global batch's keys, (n, C) and bool (n,).

        Raises:
            ValueError: more keys than the queue holds; some rows would be written twice.
        """
        if keys.shape[0] > self.size:
            raise ValueError(f"{keys.shape[0]} keys do not fit into a queue of {self.size}")
        places = (self.cursor + valid.long().cumsum(0) - 1) % self.size
        self.keys[places.masked_fill(~valid, self.size)] = keys.to(self.keys.dtype)
        fresh = valid.sum()
        self.cursor.add_(fresh).remainder_(self.size)
        self.count.add_(fresh).clamp_(max=self.size)
