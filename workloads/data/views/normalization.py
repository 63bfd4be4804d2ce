"""Normalises images with ImageNet's channel statistics (`imagenet_normalized`), which every trunk expects."""

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels R, G, B in [0, 1], as torchvision's and timm's supervised weights were trained with."""


def imagenet_normalized(images: Tensor) -> Tensor:
    """(B, 3, h, w) in [0, 1] to zero mean and unit deviation by ImageNet's statistics, in NHWC memory."""
    # Channel by channel: a tensor of three numbers would be copied to the device, which the host waits for.
    channels = [(channel - m) / s for channel, m, s in zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
