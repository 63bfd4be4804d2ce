"""An exported trunk in timm, as a feature extractor; nothing of this project need be installed.

python use_in_timm.py EXPORTED IMAGE IMAGE   # the folder that `export --format timm` wrote, and two pictures
"""

import json
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform

folder = Path(sys.argv[1])
metadata = json.loads((folder / "metadata.json").read_text())

model = timm.create_model(metadata["architecture"], pretrained=False, num_classes=0)
model.load_state_dict(torch.load(folder / metadata["files"]["timm"], weights_only=True))  # strict
side = metadata["input"]["size"][0]
prepare = create_transform(side, mean=metadata["input"]["mean"], std=metadata["input"]["std"], crop_pct=1.0)

images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in sys.argv[2:4]])
with torch.no_grad():
    features = torch.nn.functional.normalize(model.eval()(images), dim=-1)
print(f"cosine similarity {float(features[0] @ features[1]):.3f}, {features.shape[1]} features each")
