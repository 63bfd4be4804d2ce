"""SGA, RIGA and GAP-R: does a crop's embedding point at the place in the image that the crop was taken from?

For each frozen crop, the cell of highest similarity is a *hit* if its centre lies inside the crop's box, or if it is the
cell that holds the crop's centre (else a coarse level could never hit). SGA is the share of hits; RIGA the same for untrained
networks; GAP-R their ratio (arXiv 2402.13465, section 4). The protocol is frozen: nothing here depends on how a model was trained.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workloads.config import config
from workloads.data.views.cells import cell_of, cells_inside, centers_inside, one_hot_cell
from workloads.data.views.counter_random import stream, text_keys
from workloads.data.views.crops import JitterConfig, ViewsConfig, render_views
from workloads.errors import ConfigError
from workloads.metrics.bootstrap import interval, ratio
from workloads.types import FeaturePyramid, ImageBatch, Views

SUITES = ("plain", "photometric")
MEAN_MAP = "mean"
_LEAST_CELLS = 4  # a level with fewer cells a side is not scored: a guess would hit too often


@config
class GridAccuracyConfig:
    """The frozen protocol. Two runs are comparable only if all of it is equal, so it is logged with every figure."""

    view_size: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    """Side of the square that the image is stretched to, pixels."""
    crop_size: Annotated[int, Field(ge=16)] = 64
    """Side of the square that the query crop is stretched to, pixels; taken from the source resolution."""
    grid: Annotated[int, Field(ge=4)] = 16
    """Cells a side of the evaluation grid, on which the levels' maps are averaged."""
    levels: tuple[Literal["P3", "P4", "P5", "P6", "P7"], ...] = ("P3", "P4", "P5")
    """Levels in the mean map, and reported one by one; those that the model lacks are an error."""
    crops_per_image: Annotated[int, Field(ge=1, le=64)] = 8
    """Query crops of each image."""
    crop_scale: tuple[float, float] = (0.10, 0.25)
    """Least and largest side of a crop, as a share of the image's longer side."""
    untrained_networks: Annotated[int, Field(ge=0)] = 5
    """Untrained networks pooled in RIGA; 0 leaves RIGA and GAP-R out."""
    pixel_windows: tuple[Annotated[int, Field(ge=4)], ...] = (12, 16, 20, 24, 28, 32)
    """Window sides tried by the row that learns nothing, pixels of the view; the best one counts."""
    seed: int = 2402
    """Seed of the crops, the untrained networks and the bootstrap."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the images from which the 95 % intervals are read."""

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("evaluation.protocol.levels: at least one level is needed")

    def views(self, suite: str) -> ViewsConfig:
        """The crops of one suite; `photometric` changes every query's colours, and nothing else."""
        share = {"plain": 0.0, "photometric": 1.0}[suite]
        return ViewsConfig(
            full_size=self.view_size,
            crop_size=self.crop_size,
            crops_per_image=self.crops_per_image,
            crop_scale=self.crop_scale,
            jitter=JitterConfig(share=share, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0, grey=0.2),
        )


class GridModel(Protocol):
    """What the metric asks of a model: dense embeddings of an image, one embedding of a crop, comparable by cosine."""

    def embed_grid(self, images: Tensor) -> FeaturePyramid: ...

    def embed_crops(self, crops: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Hits of one network on one suite: name of the map → (N images, K crops); maps are the levels and "mean"."""

    hits: dict[str, np.ndarray]
    strict: np.ndarray  # bool (N, K): the mean map's best cell lies wholly inside the box


def frozen_views(batch: ImageBatch, protocol: GridAccuracyConfig, suite: str) -> Views:
    """The queries of `batch`: a function of the image id and the protocol alone, and the same boxes in both suites."""
    keys = text_keys(batch.image_ids).to(batch.images.device)
    return render_views(batch, protocol.views(suite), keys=keys, stream_id=stream(protocol.seed, "grid_accuracy"))


def similarity_maps(model: GridModel, views: Views, protocol: GridAccuracyConfig) -> dict[str, Tensor]:
    """Cosine similarity of each crop with each cell: {level: (B, K, h, w), "mean": (B, K, grid, grid)}, float32."""
    b, k = views.crops.shape[:2]
    pyramid = model.embed_grid(views.full)
    crops = F.normalize(model.embed_crops(views.crops.flatten(0, 1)).float(), dim=-1).reshape(b, k, -1)
    maps: dict[str, Tensor] = {}
    for level in protocol.levels:
        if level not in pyramid:
            raise ConfigError(f"evaluation.protocol.levels: the model has no {level}; it has {', '.join(pyramid)}")
        features = F.normalize(pyramid[level].float(), dim=1)
        maps[level] = torch.einsum("bkc,bchw->bkhw", crops, features)
    return with_mean_map(maps, protocol.grid)


def with_mean_map(maps: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Add the levels' maps resized bilinearly to grid × grid and averaged; levels too coarse to score stay in the mean only."""
    resized = [F.interpolate(m, size=(grid, grid), mode="bilinear", align_corners=False) for m in maps.values()]
    scored = {level: m for level, m in maps.items() if min(m.shape[-2:]) >= _LEAST_CELLS}
    return {**scored, MEAN_MAP: torch.stack(resized).mean(0)}


def would_hit(views: Views, grid_hw: tuple[int, int]) -> Tensor:
    """bool (B, K, cells): the cells that count as a hit if they are the most similar."""
    geometry = views.geometry
    box, size = geometry.box_xyxy, geometry.full_size_hw
    holds_center = one_hot_cell(cell_of(geometry.center_xy, grid_hw, size), grid_hw[0] * grid_hw[1])
    return centers_inside(box, grid_hw, size) | holds_center


def best_cell_is_in(maps: Tensor, cells: Tensor) -> Tensor:
    """bool (B, K): whether the first cell of highest similarity of (B, K, h, w) is among `cells` (B, K, h·w)."""
    best = maps.flatten(2).argmax(-1, keepdim=True)
    return cells.gather(-1, best).squeeze(-1)


def pixel_maps(views: Views, window: int, grid: int) -> Tensor:
    """The row that learns nothing: minus the distance of colour mean and deviation between crop and window.

    Returns:
        float32 (B, K, grid, grid); the window stands on each cell's centre and is cut at the border.
    """
    crops = torch.cat([views.crops.mean((-2, -1)), views.crops.square().mean((-2, -1))], dim=-1)
    return colour_maps(views.full, crops, window, grid)


def colour_maps(full: Tensor, colours: Tensor, window: int, grid: int) -> Tensor:
    """As `pixel_maps`, from square views (B, 3, s, s) and queries (B, K, 6): their channels' means and mean squares."""

    def statistics(mean: Tensor, square: Tensor) -> Tensor:
        return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], dim=-1)

    size = full.shape[-1]
    centers = (torch.arange(grid, device=full.device) + 0.5) * (size / grid)
    edges = torch.stack([centers - window / 2, centers + window / 2]).round().long().clamp(0, size)
    both = torch.cat([full, full.square()], dim=1).double()
    summed = F.pad(both.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    low, high = edges
    total = summed[..., high[:, None], high] - summed[..., low[:, None], high]
    total = total - summed[..., high[:, None], low] + summed[..., low[:, None], low]
    area = (high - low)[:, None] * (high - low)
    mean, square = (total / area).float().permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
    cells = statistics(mean, square)
    return -torch.cdist(statistics(*colours.chunk(2, dim=-1)), cells).unflatten(-1, (grid, grid))


def score_batch(maps: dict[str, Tensor], views: Views) -> tuple[dict[str, Tensor], Tensor]:
    """Hits {name: bool (B, K)} of similarity maps, and the strict hits of the mean map."""
    hits = {}
    for name, m in maps.items():
        hits[name] = best_cell_is_in(m, would_hit(views, (m.shape[-2], m.shape[-1])))
    mean = maps[MEAN_MAP]
    wholly = cells_inside(views.geometry.box_xyxy, (mean.shape[-2], mean.shape[-1]), views.geometry.full_size_hw)
    return hits, best_cell_is_in(mean, wholly)


class SuiteHits:
    """Hits of one suite, gathered batch by batch: the model's, those of untrained networks, `pixel`'s, and chance."""

    def __init__(self) -> None:
        self.rows: list[dict[str, np.ndarray]] = []

    def add(self, columns: dict[str, Tensor], valid: Tensor) -> None:
        """Columns are (B, K); rows that are not valid are left out."""
        keep = valid.cpu().numpy()
        self.rows.append({name: c.float().cpu().numpy()[keep] for name, c in columns.items()})

    def table(self) -> dict[str, np.ndarray]:
        """{name: float32 (N, K)}."""
        names = self.rows[0] if self.rows else {}
        return {name: np.concatenate([row[name] for row in self.rows]) for name in names}


@torch.no_grad()
def measure(
    model: GridModel,
    untrained: Iterable[GridModel],
    batches: Callable[[], Iterable[ImageBatch]],
    protocol: GridAccuracyConfig,
    *,
    suites: tuple[str, ...] = SUITES,
) -> dict[str, dict[str, np.ndarray]]:
    """Hits of this rank's images, {suite: {column: float32 (N, K)}}, with the image's hash as column `image` (N, 1).

    Columns: `sga` and `sga_strict` of the mean map, `sga_p3` … of the levels, `chance`, `pixel_WINDOW`, `riga_0` ….

    Args:
        model: in eval mode. untrained: networks of the same architecture, in eval mode with their initial statistics.
        batches: makes the pass over the images; called once.
    """
    others = list(untrained)
    tables = {suite: SuiteHits() for suite in suites}
    for batch in batches():
        for suite in suites:
            views = frozen_views(batch, protocol, suite)
            maps = similarity_maps(model, views, protocol)
            hits, strict = score_batch(maps, views)
            columns = {"sga" if n == MEAN_MAP else f"sga_{n.lower()}": h for n, h in hits.items()}
            columns["sga_strict"] = strict
            reach = would_hit(views, (protocol.grid, protocol.grid))
            columns["chance"] = reach.float().mean(-1)
            for window in protocol.pixel_windows:
                columns[f"pixel_{window}"] = best_cell_is_in(pixel_maps(views, window, protocol.grid), reach)
            for i, network in enumerate(others):
                columns[f"riga_{i}"] = best_cell_is_in(similarity_maps(network, views, protocol)[MEAN_MAP], reach)
            columns["image"] = text_keys(batch.image_ids)[:, None].to(views.full.device)
            _add(tables[suite], columns, batch.valid)
    return {suite: table.table() for suite, table in tables.items()}


def _add(table: SuiteHits, columns: dict[str, Tensor], valid: Tensor) -> None:
    image = columns.pop("image")
    table.add(columns, valid)
    table.rows[-1]["image"] = image.cpu().numpy()[valid.cpu().numpy()]


def merge(parts: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """Join the tables of all ranks, ordered by image, so that the figures do not depend on how images were shared out."""
    merged: dict[str, dict[str, np.ndarray]] = {}
    for suite in parts[0]:
        tables = [part[suite] for part in parts if part[suite]]
        if not tables:
            merged[suite] = {}
            continue
        joined = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        order = np.argsort(joined["image"][:, 0], kind="stable")
        merged[suite] = {name: column[order] for name, column in joined.items()}
    return merged


def summarize(tables: dict[str, dict[str, np.ndarray]], protocol: GridAccuracyConfig) -> dict[str, float]:
    """Figures under their tracking keys; the plain suite's have no infix, the other's are `eval/photometric/…`.

    `eval/sga`, `eval/sga_low`, `eval/sga_high` (95 %), `eval/sga_p3` …, `eval/sga_strict`, `eval/chance`, `eval/pixel`,
    `eval/riga`, `eval/gap_r` with its interval, `eval/over_chance`, and `eval/gain` = SGA − pixel, paired on the same crops.
    A ratio over an exact zero (no untrained network hit anything) is left out.
    """
    figures: dict[str, float] = {}
    for suite, table in tables.items():
        if not table:
            continue
        prefix = "eval/" if suite == "plain" else f"eval/{suite}/"
        figures |= {prefix + name: value for name, value in _suite_figures(table, protocol).items()}
    return figures


def _interval(numerator: np.ndarray, denominator: np.ndarray, protocol: GridAccuracyConfig) -> tuple[float, float]:
    images = len(numerator)
    return interval(ratio(numerator, denominator), images, seed=protocol.seed, resamples=protocol.bootstrap)


def _suite_figures(table: dict[str, np.ndarray], protocol: GridAccuracyConfig) -> dict[str, float]:
    per_image = {name: column.astype(np.float64).mean(1) for name, column in table.items() if name != "image"}
    n = len(per_image["sga"])
    one = np.ones(n)
    figures = {name: float(v.mean()) for name, v in per_image.items() if not name.startswith(("pixel_", "riga_"))}
    figures["images"] = float(n)
    figures["sga_low"], figures["sga_high"] = _interval(per_image["sga"], one, protocol)
    best = max((name for name in per_image if name.startswith("pixel_")), key=lambda name: per_image[name].mean())
    figures["pixel"], figures["pixel_window"] = float(per_image[best].mean()), float(best.removeprefix("pixel_"))
    gain = per_image["sga"] - per_image[best]
    figures["gain"] = float(gain.mean())
    figures["gain_low"], figures["gain_high"] = _interval(gain, one, protocol)
    figures["over_chance"] = figures["sga"] / figures["chance"]
    untrained = [v for name, v in per_image.items() if name.startswith("riga_")]
    if untrained:
        riga = np.mean(untrained, axis=0)
        figures["riga"] = float(riga.mean())
        figures["riga_low"], figures["riga_high"] = _interval(riga, one, protocol)
        if riga.any():
            figures["gap_r"] = figures["sga"] / figures["riga"]
            figures["gap_r_low"], figures["gap_r_high"] = _interval(per_image["sga"], riga, protocol)
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def paired_difference(ours: np.ndarray, theirs: np.ndarray, protocol: GridAccuracyConfig) -> tuple[float, float, float]:
    """Mean difference of two models' hits (N, K) on the same crops, and its 95 % interval over images."""
    if ours.shape != theirs.shape:
        raise ValueError(f"hits of the same crops are needed, given {ours.shape} and {theirs.shape}")
    difference = ours.astype(np.float64).mean(1) - theirs.astype(np.float64).mean(1)
    low, high = _interval(difference, np.ones(len(difference)), protocol)
    return float(difference.mean()), low, high
