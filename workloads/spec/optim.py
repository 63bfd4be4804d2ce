"""Optimiser configs and `make_optimizer`, and the learning-rate schedules: `rate_at` (cosine) and `dropped_rate_at` (steps)."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


@config
class AdamWConfig:
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    """Which optimiser."""
    lr: Positive = 1e-3
    """Peak learning rate, at the configured global batch size; never rescaled."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay; none on biases and norms."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.98)
    """Decay of the first and second moment."""


@config
class SGDConfig:
    """SGD with momentum."""

    kind: Literal["sgd"] = "sgd"
    """Which optimiser."""
    lr: Positive = 0.03
    """Peak learning rate, at the configured global batch size; never rescaled."""
    weight_decay: NotNegative = 1e-4
    """L2 penalty; none on biases and norms."""
    momentum: BelowOne = 0.9
    """Momentum."""


@config
class LARSConfig:
    """LARS (arXiv 1708.03888), for large batches."""

    kind: Literal["lars"] = "lars"
    """Which optimiser."""
    lr: Positive = 0.2
    """Peak learning rate, at the configured global batch size; never rescaled."""
    weight_decay: NotNegative = 1.5e-6
    """L2 penalty; none on biases and norms."""
    momentum: BelowOne = 0.9
    """Momentum."""
    trust: Positive = 1e-3
    """η: the layer's step is this share of its weights' norm, per norm of the gradient; biases and norms are exempt."""


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | LARSConfig, Field(discriminator="kind")]


@config
class ScheduleConfig:
    """Learning rate over the run, as a factor of the optimiser's peak."""

    warmup: BelowOne = 0.1
    """Share of the steps over which the rate rises linearly from 0."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Factor at the end of the cosine."""


@config
class DropScheduleConfig:
    """Learning rate over the run, as usual for detectors: linear warm-up, then constant with a few drops."""

    warmup: BelowOne = 0.05
    """Share of the steps over which the rate rises linearly from 0."""
    drops: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (2 / 3, 8 / 9)
    """Shares of the steps at which the rate is multiplied by `factor`; COCO's schedules drop at 60,000 and 80,000 of 90,000."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor by which a drop multiplies the rate."""


def dropped_rate_at(step: int, steps: int, schedule: DropScheduleConfig) -> float:
    """The factor of the peak rate for the update from `step` to `step + 1` of `steps`."""
    rising = min(1.0, (step + 1) / (schedule.warmup * steps)) if schedule.warmup else 1.0
    return rising * schedule.factor ** sum(step >= share * steps for share in schedule.drops)


def rate_at(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The factor of the peak rate for the update from `step` to `step + 1` of `steps`."""
    warmup = schedule.warmup * steps
    if step + 1 <= warmup:
        return (step + 1) / warmup
    progress = (step + 1 - warmup) / max(steps - warmup, 1)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(module: nn.Module, settings: AdamWConfig | SGDConfig | LARSConfig) -> torch.optim.Optimizer:
    """An optimiser with two groups: matrices and kernels, then vectors (biases, norms), which are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay, "adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    match settings:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
        case SGDConfig():
            return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
        case LARSConfig():
            return LARS(groups, lr=settings.lr, momentum=settings.momentum, trust=settings.trust)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, layer by layer, by η‖w‖ / ‖g + λw‖; groups with adapt=False are plain SGD.

    That is the rule of BYOL's and DetCon's code, whose recipes use it. arXiv 1708.03888 and `timm.optim.Lars` divide by
    ‖g‖ + λ‖w‖ instead, which is never smaller; without weight decay the two are equal.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad + group["weight_decay"] * parameter
        if group["adapt"]:
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            scale = torch.where(
                (weight_norm > 0) & (gradient_norm > 0), group["trust"] * weight_norm / gradient_norm, 1.0
            )
            gradient = gradient * scale
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
