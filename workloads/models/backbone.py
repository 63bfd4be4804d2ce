"""Contains `Trunk`, torchvision's ResNets with their four stages as output, the norms it can have, and `make_trunk` for ViTs too."""

import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torchvision
from torch import Tensor, nn

from workloads.config import config
from workloads.data.views.normalization import IMAGENET_MEAN as IMAGENET_MEAN
from workloads.data.views.normalization import IMAGENET_STD as IMAGENET_STD
from workloads.data.views.normalization import imagenet_normalized as imagenet_normalized
from workloads.parallel.distributed import gather_rows, world_size

if TYPE_CHECKING:
    from workloads.models.vit import VitTrunk

Norm = Literal["batch", "sync_batch", "group"]

Stage = Literal["C2", "C3", "C4", "C5"]
STAGES: tuple[Stage, ...] = ("C2", "C3", "C4", "C5")
_LAYERS: dict[Stage, str] = {"C2": "layer1", "C3": "layer2", "C4": "layer3", "C5": "layer4"}

STAGE_CHANNELS = {
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
}


@config
class BackboneConfig:
    """Architecture, initial weights and normalisation of a trunk."""

    name: Literal["resnet18", "resnet34", "resnet50", "vit_tiny", "vit_small"] = "resnet18"
    """Architecture: a ResNet of torchvision, or a ViT of timm with patches of 16 pixels (not for objectives with a pyramid)."""
    weights: Literal["none", "imagenet"] = "none"
    """Initial weights: none: random; imagenet: supervised, downloaded by torchvision (norm=batch only)."""
    norm: Norm = "batch"
    """batch: statistics of this worker's share; sync_batch: of the global batch; group: 32 groups of channels of each image.
    A ViT always has LayerNorm; its objective's heads have this norm."""
    frozen: bool = False
    """Train only the objective's other layers; the trunk keeps its weights, and its norms use their running statistics."""

    @property
    def is_vit(self) -> bool:
        """Whether it is a vision transformer."""
        return self.name.startswith("vit")


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W) or (N, C) with the statistics of the global batch, on any device.

    torch's SyncBatchNorm raises off the GPU. Each rank's (count, mean, sum of centred squares) are gathered in one collective,
    with gradient, in float32 or wider, and combined by Chan et al. (1979): E[x²] − E[x]² would cancel where the mean is
    large against the deviation.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2:
            return self.forward(input[..., None, None])[..., 0, 0]
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count, mean, variance, deviation, shift = _global_statistics(x)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
                    if self.momentum is None:  # a cumulative mean, as torch's norms keep
                        momentum = 1.0 / self.num_batches_tracked.float()
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), momentum)
        scale = torch.rsqrt(variance + self.eps) * (1.0 if self.weight is None else self.weight)
        offset = (shift - mean) * scale  # of what is centred already: x·scale − mean·scale would cancel
        offset = offset if self.bias is None else offset + self.bias
        return (deviation * scale[:, None, None] + offset[:, None, None]).to(input.dtype)


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of all ranks' x (N, C, H, W), with gradient, and this rank's x less a constant.

    Returns:
        Rows and pixels, a scalar; mean and biased variance, (C,); x − shift; and the shift, (C,), a constant near the mean, so
        that for the backward pass one tensor of the size of x is stored and not two.
    """
    n = x.numel() // x.shape[1]
    shift = x.detach().sum((0, 2, 3)) / max(n, 1)
    deviation = x - shift[:, None, None]
    rest = deviation.sum((0, 2, 3)) / max(n, 1)  # carries the gradient of the mean, and its rounding error
    squares = deviation.square().sum((0, 2, 3)) - n * rest.square()
    ours = torch.cat([x.new_full((1,), n), shift + rest, squares])[None]
    counts, means, sums = gather_rows(ours, counts=[1] * world_size()).split([1, *[x.shape[1]] * 2], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return total, mean, (sums + counts * (means - mean).square()).sum(0) / total, deviation, shift


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """The constructor of a 2-d norm from a number of channels."""
    match norm:
        case "batch":
            return nn.BatchNorm2d
        case "sync_batch":
            return GlobalBatchNorm2d
        case "group":
            return lambda channels: nn.GroupNorm(min(32, channels), channels)


def vector_norm(norm: Norm, channels: int) -> nn.Module:
    """The norm of a head's hidden vectors (N, C); LayerNorm where the trunk has group normalisation."""
    match norm:
        case "batch":
            return nn.BatchNorm1d(channels)
        case "sync_batch":
            return GlobalBatchNorm2d(channels)
        case "group":
            return nn.LayerNorm(channels)


def embedding_norm(norm: Norm, channels: int) -> nn.BatchNorm2d:
    """Batch normalisation without scale and shift, over this worker's share or the global batch."""
    return (GlobalBatchNorm2d if norm == "sync_batch" else nn.BatchNorm2d)(channels, affine=False)


class Trunk(nn.Module):
    """A torchvision ResNet without its classifier.

    Its `body` keeps torchvision's parameter names, so that its state dict loads into a plain `resnet*`.

    Args:
        deepest: the last stage that is built; later layers are left out.
    """

    def __init__(self, settings: BackboneConfig, *, deepest: Stage = "C5") -> None:
        super().__init__()
        self.settings = settings
        weights = "IMAGENET1K_V1" if settings.weights == "imagenet" else None
        make = torchvision.models.get_model_builder(settings.name)
        # torchvision calls the norm with a number of channels only, as GroupNorm needs it to be wrapped.
        self.body = make(weights=weights, norm_layer=norm_layer(settings.norm))
        self.body.fc = nn.Identity()
        self.stages = STAGES[: STAGES.index(deepest) + 1]
        for left_out in STAGES[len(self.stages) :]:
            setattr(self.body, _LAYERS[left_out], nn.Identity())
        self.channels = STAGE_CHANNELS[settings.name][: len(self.stages)]
        self.frozen = settings.frozen
        self.requires_grad_(not self.frozen)

    @property
    def num_features(self) -> int:
        """Channels of `pooled`."""
        return self.channels[-1]

    def pooled(self, images: Tensor) -> Tensor:
        """One vector an image, (B, num_features): the mean of the deepest stage."""
        return self(images)[self.stages[-1]].mean((-2, -1))

    def train(self, mode: bool = True) -> "Trunk":
        """Set train or eval mode; a frozen trunk stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> dict[Stage, Tensor]:
        """(B, 3, h, w), normalised, to {"C2": (B, C, h/4, w/4), …, "C5": (B, C, h/32, w/32)}, up to `deepest`."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        features: dict[Stage, Tensor] = {}
        for stage in self.stages:
            x = features[stage] = getattr(body, _LAYERS[stage])(x)
        return features


def make_trunk(settings: BackboneConfig) -> "Trunk | VitTrunk":
    """The trunk that `settings` describe, freshly initialised from the global RNG."""
    if not settings.is_vit:
        return Trunk(settings)
    from workloads.models.vit import VitConfig, VitName, VitTrunk  # needs timm

    return VitTrunk(VitConfig(name=typing.cast(VitName, settings.name)))
