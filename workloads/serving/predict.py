"""Applies a checkpoint's model to images (`Predictor`): encoded files or arrays in, embeddings or detections out."""

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
from workloads.loops.finetune import FinetuneConfig, load_detector
from workloads.metrics.grid_accuracy import GridModel
from workloads.models.backbone import imagenet_normalized
from workloads.models.detector import Detector
from workloads.models.vit import Tokens
from workloads.spec.factory import AnyObjective
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CONFIG
from workloads.types import ImageBatch


class Predictor:
    """The model of a checkpoint.

    `predict` takes float32 (B, 3, h, w) in [0, 1], or a sequence of encoded images (JPEG or any format that Pillow reads) of
    any size. A pretrained model returns the maps of its pyramid or, without one, of its trunk; a fine-tuned one detections.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.module: AnyObjective | Detector
        self.settings: PretrainConfig | FinetuneConfig
        if loop_of(read_yaml(checkpoint / CONFIG)) == "finetune":
            self.module, self.settings = load_detector(str(checkpoint))
        else:
            self.module, self.settings = load_model(checkpoint)

    def predict(self, images: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray] | list[dict[str, Any]]:
        """Level (`P3`, …), stage (`C2`, …) or token → float32 (B, C, …); or `boxes_xyxy`, `scores`, `categories` of each image.

        Raises:
            DecodeError: an image does not decode.
            ValueError: the arrays have another shape.
        """
        batch = _decoded(images) if _is_encoded(images) else np.asarray(images)
        with torch.inference_mode():
            if isinstance(self.module, Detector):
                return self._detections(self.module, batch)
            return self._embeddings(self.module, batch)

    def _embeddings(self, objective: AnyObjective, batch: ImageBatch | np.ndarray) -> dict[str, np.ndarray]:
        side = self.settings.views.input_size
        pixels = _stretched(batch, side) if isinstance(batch, ImageBatch) else _as_tensor(batch)
        features = (
            objective.embed_grid(pixels)
            if isinstance(objective, GridModel)
            else objective.trunk(imagenet_normalized(pixels))
        )
        named: Mapping[str, Tensor] = features if isinstance(features, Mapping) else _fields(features)
        return {str(name): value.float().numpy() for name, value in named.items()}

    def _detections(self, detector: Detector, batch: ImageBatch | np.ndarray) -> list[dict[str, Any]]:
        assert isinstance(self.settings, FinetuneConfig)
        views = make_detection_views(
            batch if isinstance(batch, ImageBatch) else _as_batch(batch),
            self.settings.views,
            device=torch.device("cpu"),
        )
        names = detector.categories
        return [
            {
                "boxes_xyxy": item.boxes_xyxy.numpy(),
                "scores": item.scores.numpy(),
                "categories": [names[label - 1] for label in item.labels.tolist()],
            }
            for item in detector.detect(views)
        ]


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


def _fields(tokens: Tokens) -> dict[str, Tensor]:
    return {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
