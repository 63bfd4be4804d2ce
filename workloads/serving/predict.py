"""A run's model for whoever has images and no dataset: encoded files or arrays in, embeddings or detections out."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.config import read_yaml
from workloads.data.loading.decode import DecodeError, decode_batch
from workloads.data.views.detection import make_detection_views
from workloads.loops.dispatch import loop_of
from workloads.loops.finetune import load_detector
from workloads.models.backbone import imagenet_normalized
from workloads.models.detector import Detector
from workloads.spec.loading import load_model
from workloads.storage.checkpoint import CONFIG
from workloads.types import ImageBatch


class Predictor:
    """The model of a checkpoint.

    `predict` takes float32 (B, 3, h, w) in [0, 1], or a sequence of encoded images (JPEG and what else Pillow reads) of
    any size. Of pretraining, it gives what the trunk or, where the run trained one, the pyramid embeds; of fine-tuning,
    detections.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.module: Any
        self.settings: Any
        if loop_of(read_yaml(checkpoint / CONFIG)) == "finetune":
            self.module, self.settings = load_detector(str(checkpoint))
        else:
            self.module, self.settings = load_model(checkpoint)

    def predict(self, images: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray] | list[dict[str, Any]]:
        """Level (`P3`, …), stage (`C2`, …) or token → float32 (B, C, …); or `boxes_xyxy`, `scores`, `categories` of each image.

        Raises:
            DecodeError: an image that is none.
            ValueError: arrays of another shape.
        """
        batch = _decoded(images) if _is_encoded(images) else np.asarray(images)
        with torch.inference_mode():
            if isinstance(self.module, Detector):
                return self._detections(batch)
            return self._embeddings(batch)

    def _embeddings(self, batch: "ImageBatch | np.ndarray") -> dict[str, np.ndarray]:
        pixels = _stretched(batch, self._full_size()) if isinstance(batch, ImageBatch) else _as_tensor(batch)
        if hasattr(self.module, "embed_grid"):
            found: Any = self.module.embed_grid(pixels)
        else:
            found = self.module.trunk(imagenet_normalized(pixels))
        named: Mapping[str, Tensor] = found if isinstance(found, Mapping) else _fields(found)
        return {str(name): value.float().numpy() for name, value in named.items()}

    def _detections(self, batch: "ImageBatch | np.ndarray") -> list[dict[str, Any]]:
        views = make_detection_views(
            batch if isinstance(batch, ImageBatch) else _as_batch(batch),
            self.settings.views,
            device=torch.device("cpu"),
        )
        names = self.module.categories
        return [
            {
                "boxes_xyxy": item.boxes_xyxy.numpy(),
                "scores": item.scores.numpy(),
                "categories": [names[label - 1] for label in item.labels.tolist()],
            }
            for item in self.module.detect(views)
        ]

    def _full_size(self) -> int:
        views = self.settings.views
        return int(views.input_size)


def _is_encoded(images: Any) -> bool:
    return not (isinstance(images, np.ndarray) and images.dtype != np.dtype("O")) and all(
        isinstance(image, (bytes, bytearray, memoryview)) for image in images
    )


def _decoded(images: Sequence[bytes] | np.ndarray) -> ImageBatch:
    with ThreadPoolExecutor(2) as pool:
        pixels, content_hw, source_hw, valid = decode_batch(list(images), decode_size=None, pool=pool)
    if not bool(valid.all()):
        raise DecodeError(f"image {int((~valid).nonzero()[0])} of the batch is no readable image")
    return ImageBatch.of(pixels, content_hw=content_hw, source_hw=source_hw)


def _as_tensor(images: np.ndarray) -> Tensor:
    if images.dtype == np.dtype("O"):
        images = np.stack([np.asarray(image) for image in images])
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected float32 (B, 3, h, w) in [0, 1] or encoded images, given {images.shape}")
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def _as_batch(images: np.ndarray) -> ImageBatch:
    pixels = (_as_tensor(images).clamp(0, 1) * 255).round().to(torch.uint8)
    return ImageBatch.of(pixels)


def _stretched(batch: ImageBatch, side: int) -> Tensor:
    """Each image resized to a square, antialiased, as the full view of pretraining is."""
    rows = []
    for image, (height, width) in zip(batch.images, batch.content_hw.tolist(), strict=True):
        pixels = image[None, :, :height, :width].float() / 255
        rows.append(F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(rows)


def _fields(found: Any) -> dict[str, Tensor]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
