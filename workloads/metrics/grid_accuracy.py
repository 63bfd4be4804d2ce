"""Similarity Grid Accuracy (SGA), Random-Initialisation Grid Accuracy (RIGA) and Grid Alignment Performance Ratio (GAP-R).

SGA asks whether the embedding of a crop is most similar to the cell of the image that the crop was taken from; it is the share of
crops for which it is (hits). RIGA is the same share for untrained networks, and GAP-R = SGA / RIGA (arXiv 2402.13465).
The paper's text does not define a hit, so there are two rules, measured side by side:

- `centre`: the centre of the most similar cell lies inside the crop's box, or the cell holds the centre of the crop (else a
  coarse level could never hit). Figures without a suffix follow it.
- `strict`: the whole cell lies inside the box, as public reviews of the paper describe it. Figures with `_strict` follow it.

Untrained networks normalise by batch statistics, measured on the first images of the evaluation set (`calibrate`). With the
initial statistics of BatchNorm (mean 0, variance 1) they find less than chance and GAP-R grows several-fold; that older figure
is kept as `riga_initial`. The protocol is frozen: nothing here depends on how a model was trained.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import ADDED_LATER, config, config_hash, to_dict
from workloads.data.views.cells import cell_of, cells_inside, centers_inside, one_hot_cell
from workloads.data.views.counter_random import stream, text_keys
from workloads.data.views.crops import JitterConfig, ViewsConfig, render_views
from workloads.errors import ConfigError
from workloads.metrics.bootstrap import interval, ratio
from workloads.types import FeaturePyramid, ImageBatch, Views

SUITES = ("plain", "photometric")
MEAN_MAP = "mean"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Rule = Literal["centre", "strict"]
RULES: tuple[Rule, ...] = ("centre", "strict")
"""When the most similar cell counts as a hit; see the module's docstring."""

_DEFINITION = 2  # 1: RIGA with the initial statistics of BatchNorm, the strict rule for the mean map alone

CALIBRATION_BATCH = 32
"""Images in each batch of `calibrate`; part of the protocol, because batch statistics depend on it."""
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
    statistics_images: Annotated[int, Field(ge=1), ADDED_LATER] = 128
    """Images, the first of the evaluation set, on which the batch statistics of untrained networks are measured."""
    pixel_windows: tuple[Annotated[int, Field(ge=4)], ...] = (12, 16, 20, 24, 28, 32)
    """Window sides tried by the colour-statistics baseline (`pixel`), pixels of the view; the best one counts."""
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


def protocol_hash(protocol: GridAccuracyConfig) -> str:
    """SHA-256 (hex) of the protocol and of the definition of its figures: only figures of equal hashes can be compared."""
    return config_hash({"definition": _DEFINITION, "protocol": to_dict(protocol)})


@runtime_checkable
class GridModel(Protocol):
    """A model with dense embeddings of an image and one embedding of a crop, which are compared by cosine."""

    def embed_grid(self, images: Tensor) -> FeaturePyramid: ...

    def embed_crops(self, crops: Tensor) -> Tensor: ...


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


def would_hit(views: Views, grid_hw: tuple[int, int], rule: Rule = "centre") -> Tensor:
    """bool (B, K, cells): the cells that count as a hit by `rule` if they are the most similar."""
    geometry = views.geometry
    box, size = geometry.box_xyxy, geometry.full_size_hw
    if rule == "strict":
        return cells_inside(box, grid_hw, size)
    holds_center = one_hot_cell(cell_of(geometry.center_xy, grid_hw, size), grid_hw[0] * grid_hw[1])
    return centers_inside(box, grid_hw, size) | holds_center


def best_cell_is_in(maps: Tensor, cells: Tensor) -> Tensor:
    """bool (B, K): whether the first cell of highest similarity of (B, K, h, w) is among `cells` (B, K, h·w)."""
    best = maps.flatten(2).argmax(-1, keepdim=True)
    return cells.gather(-1, best).squeeze(-1)


def pixel_maps(views: Views, window: int, grid: int) -> Tensor:
    """The colour-statistics baseline (`pixel`): minus the distance of colour mean and deviation between crop and window.

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


def column_of(figure: str, rule: Rule = "centre", level: str = MEAN_MAP, index: int | None = None) -> str:
    """Name of a column of the table of hits, and of the figure made from it: `sga`, `sga_strict_p3`, `riga_strict_0`, …."""
    parts = [figure, "strict" if rule == "strict" else "", level.lower() if level != MEAN_MAP else ""]
    return "_".join([part for part in parts if part] + ([] if index is None else [str(index)]))


def score_batch(figure: str, maps: dict[str, Tensor], views: Views, index: int | None = None) -> dict[str, Tensor]:
    """Hits of similarity maps by both rules, {column: bool (B, K)}, with columns named after `figure`."""
    return {
        column_of(figure, rule, name, index): best_cell_is_in(m, would_hit(views, (m.shape[-2], m.shape[-1]), rule))
        for name, m in maps.items()
        for rule in RULES
    }


def _chance(maps: dict[str, Tensor], views: Views) -> dict[str, Tensor]:
    """Share of the cells that would hit, {column: float (B, K)}."""
    return {
        column_of("chance", rule, name): would_hit(views, (m.shape[-2], m.shape[-1]), rule).float().mean(-1)
        for name, m in maps.items()
        for rule in RULES
    }


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
def calibrate(network: nn.Module, batches: Iterable[ImageBatch], protocol: GridAccuracyConfig) -> None:
    """Replace the running statistics of every BatchNorm of `network` by the mean of its batch statistics on `batches`.

    Every rank passes the same batches of `CALIBRATION_BATCH` images, so that the statistics do not depend on the number of
    ranks. A network without BatchNorm is left as it is.
    """
    norms = [m for m in network.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    network.eval()
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls: a shared trunk is called twice for each batch
        norm.train()
    for batch in batches:
        views = frozen_views(batch, protocol, "plain")
        network.embed_grid(views.full[batch.valid])  # type: ignore[operator]
        network.embed_crops(views.crops[batch.valid].flatten(0, 1))  # type: ignore[operator]
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def measure(
    model: GridModel,
    untrained: Iterable[GridModel],
    batches: Callable[[], Iterable[ImageBatch]],
    protocol: GridAccuracyConfig,
    *,
    initial: Iterable[GridModel] = (),
    suites: tuple[str, ...] = SUITES,
) -> dict[str, dict[str, np.ndarray]]:
    """Hits of this rank's images, {suite: {column: float32 (N, K)}}, with the image's hash as column `image` (N, 1).

    Columns (`column_of`): `sga`, `chance` and `riga_NETWORK` by both rules, of the mean map and of each level;
    `pixel_WINDOW` by both rules; `riga_initial_NETWORK`.

    Args:
        model: in eval mode.
        untrained: networks of the same architecture in eval mode, with batch statistics (`calibrate`).
        batches: starts the pass over the images; called once.
        initial: networks of the same architecture in eval mode, with the initial statistics of BatchNorm.
    """
    others, before = list(untrained), list(initial)
    tables = {suite: SuiteHits() for suite in suites}
    for batch in batches():
        for suite in suites:
            views = frozen_views(batch, protocol, suite)
            maps = similarity_maps(model, views, protocol)
            columns = score_batch("sga", maps, views) | _chance(maps, views)
            for window in protocol.pixel_windows:
                pixel = {MEAN_MAP: pixel_maps(views, window, protocol.grid)}
                columns |= score_batch("pixel", pixel, views, window)
            for i, network in enumerate(others):
                columns |= score_batch("riga", similarity_maps(network, views, protocol), views, i)
            for i, network in enumerate(before):
                mean = {MEAN_MAP: similarity_maps(network, views, protocol)[MEAN_MAP]}
                hits = score_batch("riga_initial", mean, views, i)
                columns |= {name: hit for name, hit in hits.items() if "strict" not in name}
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

    By the centre rule, of the mean map: `eval/sga`, `eval/chance`, `eval/over_chance`, `eval/pixel`, `eval/gain` (SGA − pixel,
    paired on the same crops), `eval/riga`, `eval/gap_r`, with 95 % intervals as `…_low` and `…_high`. By the strict rule the
    same with `_strict`, as `eval/sga_strict`, `eval/sga_strict_low`. Of a level the same with its name, as `eval/gap_r_p3`,
    `eval/gap_r_strict_p3` (`pixel` and `gain` have no levels). `eval/riga_initial` is RIGA with the initial statistics of BatchNorm.
    A ratio over an exact zero (no untrained network hit anything, no cell can hit) is left out.
    """
    figures: dict[str, float] = {}
    for suite, table in tables.items():
        if not table:
            continue
        prefix = "eval/" if suite == "plain" else f"eval/{suite}/"
        figures |= {prefix + name: value for name, value in _suite_figures(table, protocol).items()}
    return figures


def headline_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """`figures` without the interval bounds of single levels, which are for tables rather than for charts."""
    level_bound = re.compile(r"_p\d_(low|high)$")
    return {name: value for name, value in figures.items() if not level_bound.search(name)}


def _suite_figures(table: dict[str, np.ndarray], protocol: GridAccuracyConfig) -> dict[str, float]:
    per_image = {name: column.astype(np.float64).mean(1) for name, column in table.items() if name != "image"}
    one = np.ones(len(per_image["sga"]))
    figures = {"images": float(len(one))}
    levels = [MEAN_MAP, *(level for level in protocol.levels if f"sga_{level.lower()}" in per_image)]
    for rule in RULES:
        for level in levels:
            figures |= _map_figures(per_image, rule, level, protocol)
        windows = {window: per_image[column_of("pixel", rule, index=window)] for window in protocol.pixel_windows}
        best = max(windows, key=lambda window: windows[window].mean())
        pixel, gain = column_of("pixel", rule), column_of("gain", rule)
        figures[pixel], figures[column_of("pixel_window", rule)] = float(windows[best].mean()), float(best)
        difference = per_image[column_of("sga", rule)] - windows[best]
        figures |= _with_interval(gain, difference, one, protocol)
    if initial := _networks(per_image, "riga_initial"):
        figures["riga_initial"] = float(np.mean(initial))
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def _map_figures(
    per_image: dict[str, np.ndarray], rule: Rule, level: str, protocol: GridAccuracyConfig
) -> dict[str, float]:
    """SGA, chance, their ratio, RIGA and GAP-R of one map by one rule."""
    hits = per_image[column_of("sga", rule, level)]
    one = np.ones(len(hits))
    chance = float(per_image[column_of("chance", rule, level)].mean())
    figures = _with_interval(column_of("sga", rule, level), hits, one, protocol)
    figures[column_of("chance", rule, level)] = chance
    if chance > 0:
        figures[column_of("over_chance", rule, level)] = float(hits.mean()) / chance
    if untrained := _networks(per_image, column_of("riga", rule, level)):
        riga = np.mean(untrained, axis=0)
        figures |= _with_interval(column_of("riga", rule, level), riga, one, protocol)
        if riga.any():
            figures |= _with_interval(column_of("gap_r", rule, level), hits, riga, protocol)
    return figures


def _networks(per_image: dict[str, np.ndarray], figure: str) -> list[np.ndarray]:
    """The columns of each untrained network: `figure` and a number."""
    return [column for name, column in per_image.items() if re.fullmatch(rf"{figure}_\d+", name)]


def _with_interval(
    name: str, numerator: np.ndarray, denominator: np.ndarray, protocol: GridAccuracyConfig
) -> dict[str, float]:
    """Σ numerator / Σ denominator as `name`, and its 95 % interval over images."""
    low, high = _interval(numerator, denominator, protocol)
    return {name: float(numerator.sum() / denominator.sum()), f"{name}_low": low, f"{name}_high": high}


def _interval(numerator: np.ndarray, denominator: np.ndarray, protocol: GridAccuracyConfig) -> tuple[float, float]:
    images = len(numerator)
    return interval(ratio(numerator, denominator), images, seed=protocol.seed, resamples=protocol.bootstrap)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, protocol: GridAccuracyConfig) -> tuple[float, float, float]:
    """Mean difference of two models' hits (N, K) on the same crops, and its 95 % interval over images."""
    if ours.shape != theirs.shape:
        raise ValueError(f"hits of the same crops are needed, given {ours.shape} and {theirs.shape}")
    difference = ours.astype(np.float64).mean(1) - theirs.astype(np.float64).mean(1)
    low, high = _interval(difference, np.ones(len(difference)), protocol)
    return float(difference.mean()), low, high
