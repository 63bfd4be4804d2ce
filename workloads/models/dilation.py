"""Replaces strides of a ResNet by dilation (`dilated`), for denser feature maps."""

import copy

from torch import nn

from workloads.models.backbone import Trunk


def dilated(trunk: Trunk, stride: int) -> Trunk:
    """A copy of a ResNet trunk whose C5 has `stride` 8, 16 or 32 pixels: strides of its last stages become dilations.

    The weights are unchanged. Every second (fourth) cell of the finer map equals a cell of the original one.
    """
    copied = copy.deepcopy(trunk)
    dilation = 1
    for name, usual_stride in (("layer3", 16), ("layer4", 32)):
        blocks = getattr(copied.body, name)
        before, dilation = dilation, dilation * (2 if usual_stride > stride else 1)
        for block in blocks:
            wide = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
            for conv in wide:
                # The first convolution, which had the stride, reads a map that is not yet finer.
                step = before if block is blocks[0] and conv is wide[0] else dilation
                conv.dilation = conv.padding = (step, step)
        if usual_stride > stride:
            for module in blocks.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
    return copied
