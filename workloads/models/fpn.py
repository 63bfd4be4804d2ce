"""Contains `Pyramid`, a feature pyramid over a trunk's stages (arXiv 1612.03144) with selected levels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workloads.types import FeaturePyramid

STRIDES = {"P3": 8, "P4": 16, "P5": 32, "P6": 64, "P7": 128}
LEVELS = tuple(STRIDES)


class Pyramid(nn.Module):
    """Lateral 1×1, top-down nearest, output 3×3; P6 and P7 by stride-2 convolutions of P5 and P6 (as in RetinaNet).

    A level that is not selected has no parameters, so that every parameter has a gradient, as DDP requires.

    Args:
        channels: of the stages C2 to C5.
        levels: names out of P3 to P7.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, levels: tuple[str, ...]) -> None:
        super().__init__()
        self.levels = tuple(level for level in LEVELS if level in levels)
        by_stage = dict(zip(("P3", "P4", "P5"), channels[1:], strict=True))
        lowest = min(int(level[1]) for level in self.levels)
        self.inner = tuple(level for level in by_stage if int(level[1]) >= min(lowest, 5))
        self.lateral = nn.ModuleDict({level: nn.Conv2d(by_stage[level], out_channels, 1) for level in self.inner})
        self.output = nn.ModuleDict(
            {level: nn.Conv2d(out_channels, out_channels, 3, padding=1) for level in self.inner if level in levels}
        )
        highest = max(int(level[1]) for level in self.levels)
        self.down = nn.ModuleDict(
            {f"P{i}": nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) for i in range(6, highest + 1)}
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, stages: Mapping[Any, Tensor]) -> FeaturePyramid:
        """{"C3": …, "C5": …} to {level: (B, out_channels, H/stride, W/stride)}."""
        merged: dict[str, Tensor] = {}
        above: Tensor | None = None
        for level in reversed(self.inner):
            here = self.lateral[level](stages["C" + level[1]])
            above = here if above is None else here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            merged[level] = above
        pyramid = {level: self.output[level](merged[level]) for level in self.output}
        top = pyramid.get("P5", merged["P5"])
        for level, conv in self.down.items():
            top = conv(F.relu(top) if level != "P6" else top)
            pyramid[level] = top
        return {level: pyramid[level] for level in self.levels}
