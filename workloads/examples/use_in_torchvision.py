"""An exported trunk in torchvision's Faster R-CNN; nothing of this project need be installed.

python use_in_torchvision.py EXPORTED   # the folder that `export --format torchvision` wrote
"""

import json
import sys
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

folder = Path(sys.argv[1])
metadata = json.loads((folder / "metadata.json").read_text())

backbone = resnet_fpn_backbone(backbone_name=metadata["architecture"], weights=None, trainable_layers=5)
backbone.load_state_dict(torch.load(folder / metadata["files"]["torchvision_fpn"], weights_only=True))  # strict
detector = FasterRCNN(
    backbone,
    num_classes=3,  # the background, and two categories
    min_size=128,
    image_mean=metadata["input"]["mean"],
    image_std=metadata["input"]["std"],
)

torch.manual_seed(0)
images = [torch.rand(3, 96, 128), torch.rand(3, 128, 96)]  # in [0, 1]; the detector normalises and resizes
targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])} for _ in images]
losses = detector.train()(images, targets)
sum(losses.values()).backward()
print({name: round(float(loss.detach()), 3) for name, loss in losses.items()})
