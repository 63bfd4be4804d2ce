"""Find the object in a box of one picture in another picture, with the embeddings of a pretraining run.

python one_shot.py CHECKPOINT QUERY "x0 y0 x1 y1" TARGET   # a folder below RUN/checkpoints, two pictures, a box in pixels
"""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from workloads.metrics.one_shot import OneShotConfig, boxes_at_peaks, similarity
from workloads.spec.loading import load_model

model: Any = load_model(Path(sys.argv[1]))[0]
query, target = (Image.open(path).convert("RGB") for path in (sys.argv[2], sys.argv[4]))
x0, y0, x1, y1 = (float(side) for side in sys.argv[3].split())

protocol = OneShotConfig(view_size=256, peaks=3)
crop = pil_to_tensor(query.crop((round(x0), round(y0), round(x1), round(y1))))[None] / 255
view = resize(pil_to_tensor(target), [protocol.view_size] * 2, antialias=True)[None] / 255
scale = torch.tensor([protocol.view_size / target.width, protocol.view_size / target.height])

with torch.no_grad():
    embedded = torch.nn.functional.normalize(model.embed_crops(crop), dim=-1)
    similarities = similarity(model, view, embedded, torch.tensor([0]), protocol)
    boxes, scores = boxes_at_peaks(similarities, torch.tensor([[x1 - x0, y1 - y0]]) * scale, protocol)
for box, score in zip(boxes[0] / scale.repeat(2), scores[0], strict=True):
    print(f"similarity {float(score):.3f} at {[round(side, 1) for side in box.tolist()]}")
