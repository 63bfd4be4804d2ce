"""Evaluates a detector by average precision on a held-out dataset (`DetectionEvaluation`), and draws its detections."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from workloads.config import config
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import Dataset
from workloads.data.store.objects import Objects, read_objects, read_panoptic
from workloads.data.views.detection import DetectionViews, DetectionViewsConfig, make_detection_views
from workloads.evaluation.artifacts import artifact_folder, write_report
from workloads.metrics.average_precision import (
    DetectionTable,
    Truth,
    average_precision,
    encode_masks,
    gather_table,
)
from workloads.models.detector import Detector
from workloads.parallel.distributed import from_rank_0
from workloads.parallel.runtime import Runtime
from workloads.reports.detections import draw_detections
from workloads.types import Detections, ImageBatch


@config
class DetectionEvaluationConfig:
    """Evaluation of a detector on held-out images against the objects of their dataset, whatever it was trained on."""

    uri: str | None = None
    """Dataset of held-out images with objects, a folder or s3:// address with a manifest.json; null: no evaluation."""
    masks: str | None = None
    """COCO's panoptic json of these images (path or URI), for Mask R-CNN; null: boxes only."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations during training; null: none but at the end."""
    at_start: bool = False
    """Measure the untrained detector too, at step 0."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images per evaluation batch of one worker; changes speed and memory, not figures beyond rounding."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Evaluate only this many images, the first in the dataset's order; null: all."""
    resamples: Annotated[int, Field(ge=0)] = 200
    """Bootstrap draws of the images for AP50's interval; 0: no interval."""
    pictures: Annotated[int, Field(ge=0)] = 6
    """Images drawn with their objects and detections; 0: no picture."""


class DetectionEvaluation:
    """Measures a detector's AP figures on one dataset and reports them; every rank runs it."""

    def __init__(
        self,
        settings: DetectionEvaluationConfig,
        dataset: Dataset,
        *,
        views: DetectionViewsConfig,
        reading: DataConfig,
        categories: tuple[str, ...],
        class_agnostic: bool,
        runtime: Runtime,
    ) -> None:
        self.settings, self.dataset, self.views, self.runtime = settings, dataset, views, runtime
        self._masks = read_panoptic(settings.masks) if settings.masks is not None else None
        everything = read_objects(dataset, masks=self._masks, class_agnostic=class_agnostic)
        self._ids = list(everything)[: settings.limit]
        self._objects = {image_id: everything[image_id] for image_id in self._ids}
        # Detections in an image without segmentation are neither right nor wrong.
        self._counted = {i for i, name in enumerate(self._ids) if self._masks is None or name in self._masks.files}
        others = {name for item in self._objects.values() for name in item.categories} - set(categories)
        # Objects of a category that was not trained count as missed.
        self.labels = {name: label for label, name in enumerate((*categories, *sorted(others)), start=1)}
        self._reading = DataConfig(
            uri=dataset.uri, decode_size=reading.decode_size, decode_threads=reading.decode_threads
        )

    def run(self, detector: Detector, *, step: int, report: bool = True) -> dict[str, float]:
        """Measure `detector` and report its figures at `step`; every rank gets the same."""
        detector.eval()
        began = time.perf_counter()
        table, forward_s = self._detect(detector)
        measured = self._measure(gather_table(table), with_masks=table.masks is not None)
        # A figure without objects, as AP of small objects where there are none, is left out.
        figures = {f"eval/{name}": value for name, value in measured.items() if np.isfinite(value)}
        figures["eval/images"] = float(len(self._counted))
        figures["speed/forward_share"] = forward_s / max(time.perf_counter() - began, 1e-9)
        folder: Path | None = None
        if self.runtime.rank == 0 and report:
            with artifact_folder() as folder:
                self._write_artifacts(folder, detector, figures, step)
        if report:
            self.runtime.report(figures, step=step, artifacts=folder)
        return figures

    def _detect(self, detector: Detector) -> tuple[DetectionTable, float]:
        """This rank's detections, and the seconds of the detector's own part."""
        forward_s = 0.0
        detected: list[tuple[int, Detections]] = []
        for batch in self._batches():
            places = batch.positions[batch.valid].tolist()
            if not places:
                continue
            views = self._view(batch)
            began = time.perf_counter()
            results = detector.detect(views)
            forward_s += time.perf_counter() - began  # non-maximum suppression has waited for the device
            detected += [(place, one) for place, one in zip(places, results, strict=True) if place in self._counted]
        return self._table(detected, has_masks=detector.settings.kind == "mask_rcnn_fpn"), forward_s

    def _table(self, detected: list[tuple[int, Detections]], *, has_masks: bool) -> DetectionTable:
        counts = [len(item.scores) for _, item in detected]
        boxes = torch.cat([item.boxes_xyxy for _, item in detected] or [torch.zeros(0, 4)])
        scores = torch.cat([item.scores for _, item in detected] or [torch.zeros(0)])
        labels = torch.cat([item.labels for _, item in detected] or [torch.zeros(0, dtype=torch.int64)])
        masks = None
        if has_masks and self._masks is not None:
            masks = tuple(m for place, item in detected for m in _pasted(item, self._objects[self._ids[place]].size_hw))
        return DetectionTable(
            image=np.repeat(np.array([place for place, _ in detected], dtype=np.int64), counts),
            boxes_xyxy=boxes.cpu().double().numpy(),
            scores=scores.cpu().double().numpy(),
            labels=labels.cpu().numpy(),
            masks=masks,
        )

    def _measure(self, table: DetectionTable, *, with_masks: bool) -> dict[str, float]:
        """The figures, computed by rank 0 and known to all."""
        suites: list[tuple[str, bool]] = [("", False), *([("mask_", True)] if with_masks else [])]
        figures: dict[str, float] = {}
        if self.runtime.rank == 0:
            objects = list(self._objects.values())
            for prefix, is_mask in suites:
                detections = table if is_mask else _without_masks(table)
                truth = Truth(objects=objects, labels=self.labels, masks=self._true_masks() if is_mask else None)
                one = average_precision(detections, truth, resamples=self.settings.resamples)
                figures |= {prefix + name: value for name, value in one.items()}
        return from_rank_0(figures)

    def _true_masks(self) -> list[list[bytes]]:
        if self._masks is None:
            return []
        encoded = []
        for image_id, item in self._objects.items():
            segments = item.segments if item.segments is not None else np.zeros(0, dtype=np.int64)
            ids = self._masks.ids(image_id) if len(segments) else np.zeros(item.size_hw, dtype=np.int64)
            encoded.append(encode_masks(ids[None] == segments[:, None, None]) if len(segments) else [])
        return encoded

    def _view(self, batch: ImageBatch) -> DetectionViews:
        return make_detection_views(batch, self.views, device=self.runtime.device)

    def _batches(self, count: int | None = None) -> Iterator[ImageBatch]:
        size = self.settings.batch_size if count is None else min(count, self.settings.batch_size)
        rank, world_size = (0, 1) if count is not None else (self.runtime.rank, self.runtime.world_size)
        limit = len(self._ids) if count is None else min(count, len(self._ids))
        yield from EvalLoader(
            self.dataset, self._reading, batch_size=size, rank=rank, world_size=world_size, limit=limit
        )

    def _write_artifacts(self, folder: Path, detector: Detector, figures: Mapping[str, float], step: int) -> None:
        record = {
            "figures": dict(figures),
            "categories": list(self.labels),
            "dataset_manifest_sha256": self.dataset.manifest.sha256,
        }
        write_report(folder, "detection", step, record)
        if self.settings.pictures == 0:
            return
        shown: list[tuple[np.ndarray, Detections, Objects]] = []
        for batch in self._batches(self.settings.pictures):
            rows = batch.valid.nonzero().flatten().tolist()
            for row, detections in zip(rows, detector.detect(self._view(batch)), strict=True):
                height, width = batch.content_hw[row].tolist()
                pixels = batch.images[row, :, :height, :width].permute(1, 2, 0).numpy()
                shown.append((pixels, detections, self._objects[self._ids[int(batch.positions[row])]]))
        names = {label: name for name, label in self.labels.items()}
        title = f"step {step}:  " + "   ".join(
            f"{name} {100 * figures[key]:.1f} %"
            for name, key in (("AP50", "eval/ap50"), ("AP", "eval/ap"))
            if key in figures
        )
        draw_detections(shown, names, folder / "detections" / f"step_{step:07d}.png", title=title)


def _pasted(detections: Detections, size_hw: tuple[int, int]) -> list[bytes]:
    """The masks of one image's detections over the source image, as COCO's compressed run lengths."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    if detections.masks is None or not len(detections.masks):
        return []
    pasted = paste_masks_in_image(detections.masks[:, None].cpu(), detections.boxes_xyxy.cpu(), list(size_hw))
    return encode_masks((pasted[:, 0] > 0.5).numpy())


def _without_masks(table: DetectionTable) -> DetectionTable:
    return DetectionTable(image=table.image, boxes_xyxy=table.boxes_xyxy, scores=table.scores, labels=table.labels)
