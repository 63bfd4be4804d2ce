"""Retrieves the regions of a dataset that are most similar to a query (`most_similar`): one box an image, the best images first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workloads.data.store.objects import Objects
from workloads.metrics.grid_accuracy import GridModel
from workloads.metrics.one_shot import (
    OneShotConfig,
    Query,
    boxes_at_peaks,
    choose_queries,
    embed_queries,
    full_views,
    similarity,
)
from workloads.types import ImageBatch


@dataclass(frozen=True, slots=True)
class Region:
    """A retrieved region; `is_same`: its centre lies in an object of the query's category."""

    image: int  # number in the dataset's order
    box_xyxy: tuple[float, float, float, float]  # pixels of the upright source image
    similarity: float
    is_same: bool


def gallery_queries(objects: Mapping[str, Objects], protocol: OneShotConfig, count: int) -> list[Query]:
    """The largest object of each of `count` categories, as queries; the categories with the most queries first."""
    by_category: dict[str, list[Query]] = {}
    for query in choose_queries(objects, protocol):
        by_category.setdefault(query.category, []).append(query)
    common = sorted(by_category.values(), key=lambda queries: (-len(queries), queries[0].category))[:count]
    return [max(queries, key=_area) for queries in common]


def _area(query: Query) -> float:
    x0, y0, x1, y1 = query.box_xyxy
    return (x1 - x0) * (y1 - y0)


@torch.no_grad()
def most_similar(
    model: GridModel,
    batches: Callable[[], Iterable[ImageBatch]],
    objects: Mapping[str, Objects],
    queries: Sequence[Query],
    protocol: OneShotConfig,
    *,
    top: int,
) -> list[list[Region]]:
    """The `top` most similar regions of each query, one an image and none of its own image; two passes over the images."""
    embeddings = embed_queries({"model": model}, batches, queries, protocol).embeddings["model"]
    items, retrieved = list(objects.values()), [list[Region]() for _ in queries]
    for batch in batches():
        rows = batch.valid.nonzero().flatten()
        places = batch.positions[rows].tolist()
        if not places:
            continue
        views = full_views(batch, protocol.view_size)[rows]
        image = torch.arange(len(places), device=views.device).repeat_interleave(len(queries))
        maps = similarity(model, views, embeddings.repeat(len(places), 1), image, protocol)
        size = torch.tensor([_size_in(query, items[place], protocol) for place in places for query in queries])
        boxes, scores = boxes_at_peaks(maps, size.to(views.device), protocol)
        best = boxes[:, 0].reshape(len(places), len(queries), 4).cpu().numpy()
        highest = scores[:, 0].reshape(len(places), len(queries)).cpu().numpy()
        for i, place in enumerate(places):
            for k, query in enumerate(queries):
                if place != query.image:
                    retrieved[k].append(_region(place, best[i, k], float(highest[i, k]), items[place], query, protocol))
    return [sorted(regions, key=lambda region: (-region.similarity, region.image))[:top] for regions in retrieved]


def _size_in(query: Query, item: Objects, protocol: OneShotConfig) -> tuple[float, float]:
    x0, y0, x1, y1 = query.box_xyxy
    height, width = item.size_hw
    return (x1 - x0) * protocol.view_size / width, (y1 - y0) * protocol.view_size / height


def _region(place: int, box: np.ndarray, score: float, item: Objects, query: Query, protocol: OneShotConfig) -> Region:
    height, width = item.size_hw
    x0, y0, x1, y1 = (box / protocol.view_size * np.array([width, height, width, height])).tolist()
    center = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    mine = np.array([name == query.category for name in item.categories], dtype=bool)
    inside = (item.boxes_xyxy[:, :2] <= center).all(1) & (center < item.boxes_xyxy[:, 2:]).all(1)
    return Region(place, (x0, y0, x1, y1), score, bool((inside & mine).any()))
