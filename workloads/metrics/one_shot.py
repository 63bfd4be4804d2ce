"""Measures one-shot detection (`measure`, `summarize`): the crop of one object is searched for in another image of its category.

The similarity of the query with each cell is a map; its peaks become boxes of the query's size. AP50 is computed for each query
(COCO's 101 recalls, greedy matching at IoU ≥ .5 with all objects of the category in the image) and averaged over queries; the
pointing accuracy is the share of queries whose highest cell's centre lies in such an object. The choice of queries depends on
the dataset and the protocol alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from workloads.config import config
from workloads.data.store.objects import Objects
from workloads.data.views.cells import cell_centers
from workloads.data.views.counter_random import stream, text_keys, uniform
from workloads.data.views.resampling import axis_weights, resample
from workloads.metrics.bootstrap import interval, ratio
from workloads.metrics.figures import under, with_interval
from workloads.metrics.grid_accuracy import MEAN_MAP, GridModel, colour_maps, with_mean_map
from workloads.models.backbone import Stage, Trunk, imagenet_normalized
from workloads.types import FeaturePyramid, ImageBatch

_CANDIDATES = 4  # peaks examined for each box that is returned


@config
class OneShotConfig:
    """The frozen protocol. Two models are comparable only if all of it is equal, so it is logged with every figure."""

    view_size: Annotated[int, Field(ge=64, multiple_of=32)] = 256
    """Side of the square that the image is stretched to, pixels."""
    crop_size: Annotated[int, Field(ge=16)] = 64
    """Side of the square that the query is stretched to, pixels; taken from the source resolution."""
    grid: Annotated[int, Field(ge=4)] = 32
    """Cells a side of the map whose peaks are taken; the levels' maps are resized to it and averaged."""
    levels: tuple[str, ...] = ("P3", "P4", "P5")
    """Levels averaged in the map, of a model with a pyramid."""
    stage: Literal["C2", "C3", "C4", "C5"] = "C4"
    """Stage of the trunk whose features are compared, of a model without a pyramid."""
    peaks: Annotated[int, Field(ge=1, le=100)] = 10
    """Boxes returned for each query."""
    nms_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """IoU above which the lower of two boxes is suppressed."""
    least_side: Annotated[int, Field(ge=1)] = 24
    """Smallest side of an object that may be a query, pixels of the source; smaller ones still count as objects to be found."""
    untrained_networks: Annotated[int, Field(ge=0)] = 3
    """Networks of the same architecture with random weights, whose figures are pooled; 0: none."""
    pixel_windows: Annotated[tuple[int, ...], Field(min_length=1)] = (16, 32, 64)
    """Window sides tried by the colour-statistics baseline (`pixel`), pixels of the view; the best one counts."""
    resamples: Annotated[int, Field(ge=1)] = 1000
    """Bootstrap draws of the images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of queries, the untrained networks and the bootstrap."""


@dataclass(frozen=True, slots=True)
class Query:
    """An object of one image, and another image in which it is searched for; images are numbered in the dataset's order."""

    image: int
    box_xyxy: tuple[float, float, float, float]  # pixels of the upright source image
    target: int
    category: str


class TrunkMatcher(nn.Module):
    """A bare trunk as a `GridModel`: one stage's cells, and its mean over a crop."""

    def __init__(self, trunk: Trunk, stage: Stage) -> None:
        super().__init__()
        self.trunk, self.stage = trunk, stage

    def embed_grid(self, images: Tensor) -> FeaturePyramid:
        """(B, 3, h, w) in [0, 1] to {stage: (B, C, h/stride, w/stride)}."""
        return {self.stage: self.trunk(imagenet_normalized(images))[self.stage]}

    def embed_crops(self, crops: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] to (N, C)."""
        return self.trunk(imagenet_normalized(crops))[self.stage].mean((-2, -1))


def choose_queries(objects: Mapping[str, Objects], protocol: OneShotConfig) -> list[Query]:
    """One query for each category of each image, an object of another image, in the dataset's order of target images."""
    pool: defaultdict[str, list[tuple[int, tuple[float, float, float, float]]]] = defaultdict(list)
    for place, item in enumerate(objects.values()):
        sides = item.boxes_xyxy[:, 2:] - item.boxes_xyxy[:, :2]
        usable = item.trained() & (sides.min(axis=1, initial=np.inf) >= protocol.least_side)
        for k in np.flatnonzero(usable).tolist():
            x0, y0, x1, y1 = item.boxes_xyxy[k].tolist()
            pool[item.categories[k]].append((place, (x0, y0, x1, y1)))
    names = list(objects)
    wanted = [(place, name) for place, item in enumerate(objects.values()) for name in _present(item)]
    if not wanted:
        return []
    keys = text_keys(tuple(f"{names[place]}\0{name}" for place, name in wanted))
    draws = uniform(stream(protocol.seed, "one_shot"), keys, 1)[:, 0].tolist()
    queries = []
    for (place, name), draw in zip(wanted, draws, strict=True):
        others = [one for one in pool[name] if one[0] != place]
        if others:
            image, box = others[int(draw * len(others))]
            queries.append(Query(image, box, place, name))
    return queries


def _present(item: Objects) -> list[str]:
    return sorted({item.categories[k] for k in np.flatnonzero(item.trained()).tolist()})


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotTable:
    """Scores of each model on each of Q queries."""

    target: np.ndarray  # int64 (Q,): number of the target image
    ap50: Mapping[str, np.ndarray]  # model → float64 (Q,)
    pointing: Mapping[str, np.ndarray]  # model → float64 (Q,): 0 or 1


@torch.no_grad()
def measure(
    models: Mapping[str, GridModel],
    batches: Callable[[], Iterable[ImageBatch]],
    objects: Mapping[str, Objects],
    protocol: OneShotConfig,
) -> OneShotTable:
    """Score `models`, `pixel_WINDOW` and `center` on the same queries, in two passes over the images.

    Args:
        models: name → model in eval mode.
        batches: makes a pass over the images, at their source resolution; called twice.
        objects: of each image, in the dataset's order.
    """
    queries = choose_queries(objects, protocol)
    queried = embed_queries(models, batches, queries, protocol)
    scores: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    order: list[int] = []
    items = list(objects.values())
    for batch, rows, here in _by_image(batches(), [query.target for query in queries]):
        views = full_views(batch, protocol.view_size)
        truth, asked = _truth(queries, rows, items, protocol.view_size)
        size = _sizes(queries, rows, items, protocol.view_size)
        truth, asked, size = (t.to(views.device) for t in (truth, asked, size))
        order += rows
        for name, maps in _maps(models, views, here, queried, rows, protocol):
            boxes, heights = boxes_at_peaks(maps, size, protocol)
            best = cell_centers((protocol.grid,) * 2, (protocol.view_size,) * 2, maps.device)[maps.flatten(1).argmax(1)]
            scores[name].append((average_precision_50(boxes, heights, truth, asked), _inside(best, truth, asked)))
    place = np.argsort(np.array(order, dtype=np.int64), kind="stable")

    def column(name: str, which: int) -> np.ndarray:
        return torch.cat([pair[which].double() for pair in scores[name]]).cpu().numpy()[place]

    return OneShotTable(
        target=np.array([query.target for query in queries], dtype=np.int64),
        ap50={name: column(name, 0) for name in scores},
        pointing={name: column(name, 1) for name in scores},
    )


def full_views(batch: ImageBatch, side: int) -> Tensor:
    """float32 (B, 3, side, side) in [0, 1]: each image stretched to the square, antialiased."""
    content = batch.content_hw.to(torch.float32)
    zero, upright = torch.zeros_like(content[:, :1]), torch.zeros_like(content[:, :1], dtype=torch.bool)
    images = batch.images.to(torch.float32).div_(255.0)
    rows = axis_weights(zero, content[:, :1], upright, images.shape[2], side)
    return resample(images, rows, axis_weights(zero, content[:, 1:], upright, images.shape[3], side))[:, 0]


def crops_of(batch: ImageBatch, image: Tensor, boxes_xyxy: Tensor, side: int) -> Tensor:
    """float32 (N, 3, side, side) in [0, 1]: boxes (N, 4), source pixels, of the batch's images `image` int64 (N,)."""
    scale = (batch.content_hw[image] / batch.source_hw[image].clamp(min=1)).flip(-1).to(torch.float32)
    start, end = boxes_xyxy[:, :2] * scale, boxes_xyxy[:, 2:] * scale
    length, upright = (end - start).clamp(min=1.0), torch.zeros(len(image), 1, dtype=torch.bool, device=image.device)
    pixels = batch.images[image].to(torch.float32).div_(255.0)
    rows = axis_weights(start[:, 1:], length[:, 1:], upright, pixels.shape[2], side)
    return resample(pixels, rows, axis_weights(start[:, :1], length[:, :1], upright, pixels.shape[3], side))[:, 0]


def _by_image(
    batches: Iterable[ImageBatch], image_of_query: Sequence[int]
) -> Iterator[tuple[ImageBatch, list[int], Tensor]]:
    """Each batch with the queries of its images: their numbers, and int64 (q,), the row of each one's image."""
    by_image: defaultdict[int, list[int]] = defaultdict(list)
    for number, image in enumerate(image_of_query):
        by_image[image].append(number)
    for batch in batches:
        pairs = [
            (number, row)
            for row, (place, valid) in enumerate(zip(batch.positions.tolist(), batch.valid.tolist(), strict=True))
            if valid
            for number in by_image.get(place, ())
        ]
        if pairs:
            yield (
                batch,
                [number for number, _ in pairs],
                torch.tensor([row for _, row in pairs]).to(batch.images.device),
            )


@dataclass(slots=True)
class QueryEmbeddings:
    """Embeddings and colour statistics of Q queries."""

    embeddings: dict[str, Tensor]  # model → (Q, D), of unit length
    colours: Tensor  # (Q, 6): channel means and mean squares


def embed_queries(
    models: Mapping[str, GridModel],
    batches: Callable[[], Iterable[ImageBatch]],
    queries: Sequence[Query],
    protocol: OneShotConfig,
) -> QueryEmbeddings:
    """The crops of all queries, embedded by each model, in one pass over the images."""
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    order: list[int] = []
    for batch, rows, image in _by_image(batches(), [query.image for query in queries]):
        boxes = torch.tensor([queries[number].box_xyxy for number in rows], device=image.device)
        crops = crops_of(batch, image, boxes, protocol.crop_size)
        order += rows
        for name, model in models.items():
            parts[name].append(F.normalize(model.embed_crops(crops).float(), dim=-1))
        parts[""].append(torch.cat([crops.mean((-2, -1)), crops.square().mean((-2, -1))], dim=-1))
    place = torch.argsort(torch.tensor(order), stable=True)
    joined = {name: torch.cat(values)[place.to(values[0].device)] for name, values in parts.items()}
    colours = joined.pop("", torch.zeros(0, 6))
    return QueryEmbeddings(joined, colours)


def _maps(
    models: Mapping[str, GridModel],
    views: Tensor,
    image: Tensor,
    queried: QueryEmbeddings,
    rows: Sequence[int],
    protocol: OneShotConfig,
) -> Iterator[tuple[str, Tensor]]:
    """(model, float32 (q, grid, grid)): the mean map of each query in its image."""
    number = torch.tensor(rows, device=views.device)
    for name, model in models.items():
        yield name, similarity(model, views, queried.embeddings[name][number], image, protocol)
    for window in protocol.pixel_windows:
        every = colour_maps(views, queried.colours[number][None].expand(len(views), -1, -1), window, protocol.grid)
        yield f"pixel_{window}", every[image, torch.arange(len(image), device=image.device)]
    center = cell_centers((protocol.grid,) * 2, (1, 1), views.device) - 0.5
    yield "center", -center.square().sum(-1).reshape(1, protocol.grid, protocol.grid).expand(len(rows), -1, -1)


def similarity(model: GridModel, views: Tensor, queries: Tensor, image: Tensor, protocol: OneShotConfig) -> Tensor:
    """float32 (q, grid, grid): cosine of queries (q, D), of unit length, with the cells of `views[image]`, levels averaged."""
    pyramid = model.embed_grid(views)
    chosen = [level for level in pyramid if level in protocol.levels or len(pyramid) == 1]
    maps = {
        level: torch.einsum("qc,qchw->qhw", queries, F.normalize(pyramid[level].float(), dim=1)[image])[:, None]
        for level in chosen
    }
    return with_mean_map(maps, protocol.grid)[MEAN_MAP][:, 0]


def boxes_at_peaks(maps: Tensor, size_wh: Tensor, protocol: OneShotConfig) -> tuple[Tensor, Tensor]:
    """The highest peaks of maps (q, g, g) as boxes of `size_wh` (q, 2), pixels of the view, clipped to it, best first.

    A peak is a cell that no neighbour exceeds. Of two boxes that overlap more than the protocol allows, the higher stays.

    Returns:
        (q, peaks, 4) xyxy and (q, peaks) scores, −inf where there are fewer peaks.
    """
    q, g = len(maps), maps.shape[-1]
    peak = F.max_pool2d(maps[:, None], 3, stride=1, padding=1)[:, 0] == maps
    count = min(_CANDIDATES * protocol.peaks, g * g)
    scores, cells = maps.masked_fill(~peak, -torch.inf).flatten(1).sort(dim=1, descending=True, stable=True)
    scores, cells = scores[:, :count], cells[:, :count]
    centers = cell_centers((g, g), (protocol.view_size,) * 2, maps.device)[cells]
    half = size_wh[:, None] / 2
    boxes = torch.cat([centers - half, centers + half], dim=-1).clamp(0, protocol.view_size)
    peaks = torch.isfinite(scores)
    rows = torch.arange(q, device=maps.device)[:, None]
    # In float64, because `batched_nms` moves each query's boxes by an offset of its own.
    stays = batched_nms(
        boxes[peaks].double(), scores[peaks].double(), rows.expand_as(peaks)[peaks], protocol.nms_threshold
    )
    number = peaks.nonzero()[stays]
    kept = torch.zeros_like(peaks).index_put_((number[:, 0], number[:, 1]), peaks.new_ones(()))
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, : protocol.peaks]
    return boxes[rows, order], scores.masked_fill(~kept, -torch.inf)[rows, order]


def average_precision_50(boxes: Tensor, scores: Tensor, truth: Tensor, asked: Tensor) -> Tensor:
    """Each query's AP at IoU ≥ .5 by COCO's conventions, float64 (q,).

    Args:
        boxes: (q, p, 4), best first; scores (q, p), −inf for none.
        truth: (q, t, 4); asked: bool (q, t), which of them are objects.
    """
    overlap = torch.vmap(box_iou)(boxes, truth).nan_to_num(0.0).masked_fill(~asked[:, None], -1.0)
    free = asked.clone()
    hits = []
    for i in range(boxes.shape[1]):
        best, match = overlap[:, i].masked_fill(~free, -1.0).max(1)
        hit = (best >= 0.5) & torch.isfinite(scores[:, i])
        free[hit.nonzero()[:, 0], match[hit]] = False
        hits.append(hit)
    seen = torch.isfinite(scores).double().cumsum(1)
    true = torch.stack(hits, dim=1).double().cumsum(1)
    precision = true / seen.clamp(min=1)
    precision = precision.flip(1).cummax(1).values.flip(1)
    recall = true / asked.sum(1, keepdim=True).clamp(min=1)
    recalls = torch.linspace(0, 1, 101, dtype=torch.float64, device=boxes.device).expand(len(boxes), -1).contiguous()
    place = torch.searchsorted(recall.contiguous(), recalls)
    padded = F.pad(precision, (0, 1))  # a recall that is never reached has precision 0
    return padded.gather(1, place).mean(1)


def _inside(points: Tensor, truth: Tensor, asked: Tensor) -> Tensor:
    inside = (points[:, None] >= truth[..., :2]) & (points[:, None] < truth[..., 2:])
    return (inside.all(-1) & asked).any(1)


def _truth(queries: Sequence[Query], rows: Sequence[int], items: Sequence[Objects], side: int) -> tuple[Tensor, Tensor]:
    """The objects of each query's category in its target image: (q, t, 4) in pixels of the view, and which rows are objects, (q, t)."""
    boxes = []
    for number in rows:
        item = items[queries[number].target]
        mine = np.array([name == queries[number].category for name in item.categories]) & item.trained()
        scale = np.array([side / item.size_hw[1], side / item.size_hw[0]] * 2, dtype=np.float32)
        boxes.append(torch.from_numpy(item.boxes_xyxy[mine] * scale))
    lengths = torch.tensor([len(one) for one in boxes])
    truth = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    return truth, torch.arange(truth.shape[1])[None] < lengths[:, None]


def _sizes(queries: Sequence[Query], rows: Sequence[int], items: Sequence[Objects], side: int) -> Tensor:
    """(q, 2): width and height of each query, as many source pixels in the target image as it has in its own."""
    sizes = []
    for number in rows:
        x0, y0, x1, y1 = queries[number].box_xyxy
        height, width = items[queries[number].target].size_hw
        sizes.append(((x1 - x0) * side / width, (y1 - y0) * side / height))
    return torch.tensor(sizes)


def summarize(table: OneShotTable, protocol: OneShotConfig) -> dict[str, float]:
    """Figures by tracking key, with 95 % intervals over images: `eval/one_shot/ap50` and `pointing` of `model`; `NAME_ap50` … of
    the untrained networks (pooled), the best `pixel` window, `center` and, where it was measured, `supervised`; and the paired
    gains `ap50_over_NAME` … over the first three."""
    images = np.unique(table.target)
    figures = {"queries": float(len(table.target)), "images": float(len(images))}
    for what, columns in (("ap50", table.ap50), ("pointing", table.pointing)):
        if not len(table.target):
            continue
        ours = columns["model"]
        pixel = max((name for name in columns if name.startswith("pixel_")), key=lambda name: columns[name].mean())
        untrained = [value for name, value in columns.items() if name.startswith("untrained_")]
        others = {"pixel": columns[pixel], "center": columns["center"]}
        others |= {"untrained": np.mean(untrained, axis=0)} if untrained else {}
        figures |= _mean_of(what, ours, table, protocol)
        for name, values in others.items():
            figures |= _mean_of(f"{name}_{what}", values, table, protocol)
            figures |= _mean_of(f"{what}_over_{name}", ours - values, table, protocol)
        if "supervised" in columns:
            figures |= _mean_of(f"supervised_{what}", columns["supervised"], table, protocol)
    return under("eval/one_shot", figures)


def _mean_of(name: str, values: np.ndarray, table: OneShotTable, protocol: OneShotConfig) -> dict[str, float]:
    """The mean of `values`, float64 (Q,), as the figure `name` with its interval over target images."""
    images, index = np.unique(table.target, return_inverse=True)
    count = np.bincount(index, minlength=len(images)).astype(np.float64)
    total = np.bincount(index, weights=values, minlength=len(images))
    ends = interval(ratio(total, count), len(images), seed=protocol.seed, resamples=protocol.resamples)
    return with_interval(name, float(values.mean()), ends)
