"""Draws a discovery: images with their boxes, and crops of the boxes of each cluster (`draw_pictures`)."""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.annotations import Annotations
from workloads.data.store.manifest import Dataset
from workloads.discovery.pseudo_boxes import BoxTable
from workloads.loops.discovery.job import DiscoverConfig, Method
from workloads.metrics.corloc import Hits
from workloads.reports.discoveries import Panel, draw_clusters, draw_discoveries

_PICTURE_SIDE = 320  # pixels
_CLUSTERS_SHOWN, _CROPS_SHOWN = 24, 10


def draw_pictures(
    settings: DiscoverConfig,
    dataset: Dataset,
    boxes: Mapping[Method, BoxTable],
    truth: Mapping[str, Annotations],
    hits: Mapping[Method, Hits],
    folder: Path,
) -> None:
    """Write `boxes.png`, the first images with each method's best box, and with clusters `clusters.png`, to `folder`."""
    best = {method: table.best() for method, table in boxes.items()}
    iou = {m: dict(zip(mine.image_ids, mine.best_iou.tolist(), strict=True)) for m, mine in hits.items()}
    # Boxes that lie the same in every image would only hide the others; their IoU is shown all the same.
    drawn = [m for m in best if m not in ("whole", "centre", "random")] or list(best)
    panels = []
    for image_id, pixels, scale in _pictures(settings, dataset, settings.gallery):
        panels.append(
            Panel(
                pixels=pixels,
                title=image_id,
                objects=settings.corloc.counted(truth[image_id]) * scale,
                boxes={m: best[m][image_id] * scale for m in drawn if image_id in best[m]},
                iou={m: values[image_id] for m, values in iou.items() if image_id in values},
            )
        )
    draw_discoveries(panels, folder / "boxes.png", threshold=settings.corloc.iou)
    if settings.clusters.count is not None:
        first = boxes[settings.methods[0]]
        draw_clusters(_cluster_crops(settings, dataset, first), folder / "clusters.png")


def _pictures(settings: DiscoverConfig, dataset: Dataset, limit: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Id, pixels uint8 (h, w, 3) shrunk for a picture, and the scale (4,) of its boxes, of the first images that decode."""
    small = DataConfig(uri=settings.uri, decode_size=_PICTURE_SIDE)
    limit = min(limit, settings.limit or limit)
    for batch in EvalLoader(dataset, small, batch_size=16, limit=limit):
        for i in batch.valid.nonzero().flatten().tolist():
            height, width = batch.content_hw[i].tolist()
            scale = (batch.content_hw[i] / batch.source_hw[i]).flip(0).repeat(2).numpy()
            yield batch.image_ids[i], batch.images[i, :, :height, :width].permute(1, 2, 0).numpy(), scale


def _cluster_crops(
    settings: DiscoverConfig, dataset: Dataset, boxes: BoxTable
) -> dict[str, tuple[int, list[np.ndarray]]]:
    """Category → its number of boxes, and the pixels of its first ones, the largest categories first."""
    counts = collections.Counter(boxes.categories)
    wanted: dict[str, list[np.ndarray]] = {name: [] for name, _ in counts.most_common(_CLUSTERS_SHOWN)}
    rows = {image_id: row for row, image_id in enumerate(boxes.image_ids)}
    for image_id, pixels, scale in _pictures(settings, dataset, dataset.num_images):
        row = rows.get(image_id)
        crops = wanted.get(boxes.categories[row]) if row is not None else None
        if row is None or crops is None or len(crops) >= _CROPS_SHOWN:
            continue
        x0, y0, x1, y1 = np.rint(boxes.boxes_xyxy[row] * scale).astype(int).tolist()
        crops.append(pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)])
        if all(len(crops) >= min(_CROPS_SHOWN, counts[name]) for name, crops in wanted.items()):
            break
    return {name: (counts[name], crops) for name, crops in wanted.items()}
