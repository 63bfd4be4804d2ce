"""Computes the boxes of a discovery's parts: `PartWorker` loads the networks once and writes one file for each part."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.objects import AGNOSTIC
from workloads.data.views.detection import make_detection_views
from workloads.data.views.resampling import crop_boxes
from workloads.discovery import baselines
from workloads.discovery.components import FeaturesError, ObjectRegions
from workloads.discovery.features import PatchExtractor, PatchFeatures, cells_to_pixels, same_size_groups
from workloads.discovery.lost import lost
from workloads.discovery.pseudo_boxes import read_boxes
from workloads.discovery.tokencut import tokencut, tokencut_bytes
from workloads.errors import ConfigError
from workloads.loops.discovery.job import NEEDS_TRUNK, DiscoverConfig, Job, Method, trunk_of
from workloads.loops.finetune import load_detector
from workloads.models.backbone import imagenet_normalized
from workloads.storage.filesystems import atomic_write
from workloads.types import ImageBatch

_SIDES = ("x0", "y0", "x1", "y1")
PART_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("image_id", pa.string()),
        ("method", pa.string()),
        ("decoded", pa.bool_()),
        *[(side, pa.float32()) for side in _SIDES],  # null where there is no box
        ("score", pa.float32()),
        ("category", pa.string()),
        ("feature", pa.list_(pa.float32())),
    ]
)


class PartWorker:
    """Computes the boxes of any number of parts, one after the other, with the networks of one process.

    Raises:
        ConfigError: an image of the dataset is too large for the memory that tokencut needs.
    """

    def __init__(self, job: Job, *, device: torch.device | str = "cpu") -> None:
        self._job, self._settings, self._device = job, job.settings, torch.device(device)
        self._dataset = open_dataset(job.settings.uri)
        self._extractor: PatchExtractor | None = None
        if job.settings.uses_trunk:
            trunk = trunk_of(job.settings)
            self._extractor = PatchExtractor(trunk, stride=job.settings.stride).eval().to(self._device)
        self._detector = None
        if job.settings.detector is not None:
            self._detector = load_detector(job.settings.detector, device=self._device)
        self._given = read_boxes(job.settings.file).best() if job.settings.file is not None else {}
        if "tokencut" in job.settings.methods and self._extractor is not None:
            check_tokencut_fits(job.settings, self._dataset, self._extractor.cell, memory_of(self._device))

    def run(self, part: int) -> int:
        """Compute the boxes of one part and write its file; returns its number of images. Safe to repeat.

        Raises:
            DataError: a shard cannot be read.
            FeaturesError: features are not finite; the message names the images.
        """
        rows: list[dict[str, Any]] = []
        images = 0
        for batch in self._batches(part):
            rows += self._rows(batch)
            images += sum(1 for image_id in batch.image_ids if image_id)
        with atomic_write(self._job.state[0], self._job.part_path(part)) as sink:
            pq.write_table(pa.Table.from_pylist(rows, schema=PART_SCHEMA), sink, compression="zstd")
        return images

    def _batches(self, part: int) -> Iterator[ImageBatch]:
        loader = EvalLoader(
            self._dataset,
            reading(self._settings),
            batch_size=self._settings.batch_size,
            rank=part,
            world_size=self._job.num_parts,
            limit=self._job.num_images,
        )
        for batch in loader:
            yield batch.to(self._device)

    @torch.no_grad()
    def _rows(self, batch: ImageBatch) -> list[dict[str, Any]]:
        one_box: list[Method] = [method for method in self._settings.methods if method != "detector"]
        boxes = {method: torch.zeros(len(batch.image_ids), 4, dtype=torch.float64) for method in one_box}
        scores = {method: torch.ones(len(batch.image_ids)) for method in one_box}
        for method in one_box:
            if method not in NEEDS_TRUNK:
                boxes[method] = self._without_trunk(method, batch)
        if any(method in NEEDS_TRUNK for method in self._settings.methods):
            self._with_trunk(batch, boxes, scores)
        features = self._features(batch, boxes.get(self._settings.methods[0]))
        rows = _part_rows(batch, boxes, scores, features, first=self._settings.methods[0])
        return rows + (self._detected(batch) if self._detector is not None else [])

    def _detected(self, batch: ImageBatch) -> list[dict[str, Any]]:
        """The detector's rows: one for each box, and one without a box for an image without detections."""
        assert self._detector is not None
        detector, trained = self._detector
        views = make_detection_views(batch, trained.views, device=self._device)
        results = iter(detector.detect(views) if bool(batch.valid.any()) else [])
        rows = []
        for i, (image_id, valid) in enumerate(zip(batch.image_ids, batch.valid.tolist(), strict=True)):
            if not image_id:
                continue
            place = {"position": int(batch.positions[i]), "image_id": image_id, "method": "detector", "decoded": valid}
            detections = next(results) if valid else None
            if detections is None or not len(detections.scores):
                rows.append({**place, **dict.fromkeys(_SIDES), "score": None, "category": None, "feature": None})
                continue
            columns = (detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist())
            for box, score, label in zip(*columns, strict=True):
                sides = dict(zip(_SIDES, box, strict=True))
                name = detector.categories[label - 1]
                rows.append({**place, **sides, "score": score, "category": name, "feature": None})
        return rows

    def _with_trunk(self, batch: ImageBatch, boxes: dict[Method, Tensor], scores: dict[Method, Tensor]) -> None:
        assert self._extractor is not None
        for group in same_size_groups(batch, self._extractor.cell):
            patches = self._extractor(group.images)
            rows = group.rows.cpu()
            for method in self._settings.methods:
                if method in NEEDS_TRUNK:
                    try:
                        regions = localize(method, patches, self._settings)
                    except FeaturesError as error:
                        names = ", ".join(batch.image_ids[i] for i in rows.tolist())
                        raise FeaturesError(f"{method}: {error}; among the images {names}") from None
                    in_pixels = cells_to_pixels(
                        regions.boxes_xyxy,
                        self._extractor.cell,
                        batch.content_hw[group.rows],
                        batch.source_hw[group.rows],
                    )
                    boxes[method][rows], scores[method][rows] = in_pixels.cpu(), regions.scores.cpu()

    def _without_trunk(self, method: Method, batch: ImageBatch) -> Tensor:
        source = batch.source_hw.cpu()
        match method:
            case "whole":
                return baselines.whole_image(source)
            case "centre":
                return baselines.centre_box(source, self._settings.centre.side)
            case "random":
                return baselines.random_box(batch.image_ids, source, seed=self._settings.seed)
            case "felzenszwalb":
                return self._regions(batch)
        missing = np.full(4, np.nan)
        return torch.from_numpy(np.stack([self._given.get(image_id, missing) for image_id in batch.image_ids]))

    def _regions(self, batch: ImageBatch) -> Tensor:
        boxes = torch.zeros(len(batch.image_ids), 4, dtype=torch.float64)
        for i in batch.valid.nonzero().flatten().tolist():
            height, width = batch.content_hw[i].tolist()
            pixels = batch.images[i, :, :height, :width].cpu().numpy()
            shares = torch.from_numpy(baselines.felzenszwalb_box(pixels, self._settings.felzenszwalb))
            boxes[i] = shares * batch.source_hw[i].cpu().flip(0).repeat(2)
        return boxes

    def _features(self, batch: ImageBatch, boxes: Tensor | None) -> np.ndarray | None:
        """float32 (B, D): features of the boxes' crops, or None where clusters are not configured."""
        if self._settings.clusters.count is None or boxes is None:
            return None
        assert self._extractor is not None
        scale = (batch.content_hw.double() / batch.source_hw.clamp(min=1)).flip(1).repeat(1, 2).cpu()
        on_canvas = (boxes * scale).nan_to_num()
        on_canvas[:, 2:] = torch.maximum(on_canvas[:, 2:], on_canvas[:, :2] + 1)
        crops = crop_boxes(batch.images, on_canvas.to(self._device), self._settings.clusters.crop_size)
        return self._extractor.describe(imagenet_normalized(crops)).cpu().numpy()


def reading(settings: DiscoverConfig) -> DataConfig:
    """The `DataConfig` by which images are read for discovery."""
    return DataConfig(uri=settings.uri, decode_size=settings.long_side, decode_threads=settings.decode_threads)


def check_tokencut_fits(settings: DiscoverConfig, dataset: Dataset, cell: int, memory: int) -> None:
    """See that TokenCut's matrices of the largest image fit into `memory` bytes, before any image is decoded.

    Args:
        cell: side of a cell, pixels.

    Raises:
        ConfigError: they do not; the message says at which `long_side` they would.
    """
    sides = [item.size_hw for item in read_annotations(dataset).values()] if dataset.num_images else []
    height, width = max(
        (_shrunk(side, settings.long_side) for side in sides), key=lambda hw: hw[0] * hw[1], default=(0, 0)
    )
    cells = -(-height // cell) * -(-width // cell)
    if tokencut_bytes(cells) > memory:
        fits = next(side for side in range(max(height, width) // cell * cell, 0, -cell) if _fits(side, cell, memory))
        raise ConfigError(
            f"long_side: tokencut needs {tokencut_bytes(cells) / 2**30:,.0f} GiB for an image of {width}×{height} pixels "
            f"({cells:,} cells), and {memory / 2**30:,.0f} GiB are there; set long_side={fits} or less, or leave tokencut out"
        )


def _shrunk(size_hw: tuple[int, int], long_side: int | None) -> tuple[int, int]:
    scale = min(1.0, long_side / max(size_hw)) if long_side is not None else 1.0
    return round(size_hw[0] * scale), round(size_hw[1] * scale)


def _fits(side: int, cell: int, memory: int) -> bool:
    """Whether a square of `side` pixels fits twice, so that decoding and the trunk have room too."""
    return side == cell or 2 * tokencut_bytes((side // cell) ** 2) <= memory


def memory_of(device: torch.device) -> int:
    """Bytes of memory that `device` has in all; of a host, the container's limit where there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another kind of container, or "max"
        return physical


def localize(method: Method, patches: PatchFeatures, settings: DiscoverConfig) -> ObjectRegions:
    """The regions that a method of `NEEDS_TRUNK` finds in patch features."""
    if method == "lost":
        return lost(patches.features, patches.grid_hw, settings.lost)
    if method == "tokencut":
        return tokencut(patches.features, patches.grid_hw, settings.tokencut)
    if patches.cls_attention is None:
        raise ConfigError("methods: cls_attention needs a transformer, and trunk is a ResNet; use trunk.kind=vit")
    return baselines.cls_attention(patches.cls_attention, patches.grid_hw, settings.cls_attention)


def _part_rows(
    batch: ImageBatch,
    boxes: Mapping[Method, Tensor],
    scores: Mapping[Method, Tensor],
    features: np.ndarray | None,
    *,
    first: Method,
) -> list[dict[str, Any]]:
    """One row for each image and method; `features` are of the boxes of the method `first`."""
    rows = []
    for i, (image_id, valid) in enumerate(zip(batch.image_ids, batch.valid.tolist(), strict=True)):
        if not image_id:  # padding
            continue
        for method in boxes:
            box = boxes[method][i].tolist()
            has_box = valid and not any(math.isnan(side) for side in box)
            has_feature = has_box and features is not None and method == first
            rows.append(
                {
                    "position": int(batch.positions[i]),
                    "image_id": image_id,
                    "method": method,
                    "decoded": valid,
                    **dict(zip(_SIDES, box if has_box else [None] * 4, strict=True)),
                    "score": float(scores[method][i]) if has_box else None,
                    "category": AGNOSTIC if has_box else None,
                    "feature": features[i].tolist() if has_feature and features is not None else None,
                }
            )
    return rows
