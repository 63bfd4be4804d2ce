"""Implements anchor NT-Xent (`AnchorNTXent`, arXiv 2402.13465): a crop is matched with the cell where it was taken.

The crop's embedding z_i is attracted to the pyramid cell that holds the crop's centre, and repelled from the positive cells
of other images in the global batch (inter-image) and from cells of its own image outside its box (anchor negatives).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config
from workloads.data.views.cells import cell_centers, cell_of, centers_inside, one_hot_cell
from workloads.data.views.counter_random import stream, uniform
from workloads.errors import ConfigError
from workloads.models.backbone import STAGES, BackboneConfig, Stage, Trunk, embedding_norm, imagenet_normalized
from workloads.models.fpn import STRIDES, Pyramid
from workloads.models.heads import Projector
from workloads.parallel.distributed import averaged, gather_rows, global_mean, row_counts
from workloads.types import CropGeometry, FeaturePyramid, StepResult, Views

Level = Literal["P3", "P4", "P5", "P6", "P7"]


@config
class AnchorNTXentConfig:
    """Settings of anchor NT-Xent; all of them can be swept."""

    kind: Literal["anchor_ntxent"] = "anchor_ntxent"
    """Name of the objective."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature τ; cosine similarities are divided by it."""
    crop_grid: Literal["native"] | Annotated[int, Field(ge=2, le=128)] = "native"
    """Grid over the full view from whose cells anchor negatives are drawn: g for g × g, native for that of the level."""
    anchor_negatives: Annotated[int, Field(ge=0)] = 64
    """Largest number of cells of the same image that are negatives of a crop; 0: none, the plain NT-Xent ablation."""
    levels: tuple[Level, ...] = ("P3", "P4", "P5")
    """Pyramid levels that are trained, with equal weights."""
    projection_dim: Annotated[int, Field(ge=8)] = 128
    """Channels of the pyramid and of the crop's embedding."""
    projector_hidden: Annotated[int, Field(ge=8)] = 512
    """Hidden width of the crop's projector."""
    crop_stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = ("C5",)
    """Stages of the trunk whose mean over the crop is the projector's input; [C5] is the paper's choice. A separate crop
    trunk ends with the deepest of them."""
    center_embeddings: bool = True
    """Whether embeddings are batch-normalised, without scale and shift, before the similarity; no effect with backbone.norm=group."""
    shared_trunk: bool = False
    """true: one trunk for crops and full views; false: one each, as in the paper."""
    symmetric: bool = False
    """Whether to average with the loss of the opposite direction, from each positive cell to the crops of all images."""

    def __post_init__(self) -> None:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"objective.levels: expected distinct levels out of P3…P7, given {list(self.levels)}")

    def check_views(self, full_size: int) -> None:
        """Check that each level can have anchor negatives in a full view of `full_size` pixels.

        Raises:
            ConfigError: names the level and the key to change.
        """
        for level in self.levels:
            cells = math.ceil(full_size / STRIDES[level])
            if cells == 1 and self.anchor_negatives > 0 and self.crop_grid == "native":
                raise ConfigError(
                    f"objective.levels: {level} is a single cell at views.full_size={full_size}, so it has no anchor "
                    "negative; leave the level out, enlarge the view, or set objective.anchor_negatives=0"
                )


def choose_anchors(geometry: CropGeometry, grid_hw: tuple[int, int], count: int, draws: Tensor) -> Tensor:
    """Choose the cells that are anchor negatives of each crop.

    A cell qualifies if its centre lies outside the crop's box and it does not hold the crop's centre; of those, the `count`
    with the least draws are chosen, or all if there are fewer.

    Args:
        draws: float32 (B, K, cells) from [0, 1).

    Returns:
        bool (B, K, cells), row-major cells of `grid_hw`.
    """
    cells = grid_hw[0] * grid_hw[1]
    box, size = geometry.box_xyxy, geometry.full_size_hw
    holds_center = one_hot_cell(cell_of(geometry.center_xy, grid_hw, size), cells)
    available = ~centers_inside(box, grid_hw, size) & ~holds_center
    if count >= cells:
        return available
    order = draws.masked_fill(~available, 2.0).argsort(dim=-1, stable=True)
    chosen = torch.zeros_like(available).scatter(-1, order[..., :count], True)
    return chosen & available


def embeddings_on_grid(level: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """A level (B, C, h, w) sampled bilinearly at the centres of a grid: (B, C, cells); the level itself where the grids agree."""
    if level.shape[-2:] == torch.Size(grid_hw):
        return level.flatten(2)
    centers = cell_centers(grid_hw, (2, 2), level.device) - 1.0
    grid = centers.to(level.dtype).reshape(1, *grid_hw, 2).expand(level.shape[0], -1, -1, -1)
    return F.grid_sample(level, grid, mode="bilinear", padding_mode="border", align_corners=False).flatten(2)


def anchor_ntxent_loss(
    crops: Tensor,
    cells: Tensor,
    anchor_similarity: Tensor,
    anchors: Tensor,
    image: Tensor,
    valid: Tensor,
    *,
    temperature: float,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """−log(e^{sim(z_i,z_j)/τ} / (e^{sim(z_i,z_j)/τ} + Σ inter-image + Σ anchors)) of this rank's crops (eq. 2 of the paper).

    Positives of the same image are not negatives of each other. Computed in float32 with log-sum-exp for any input precision.

    Args:
        crops: (n, D) embeddings z_i, not normalised.
        cells: (n, D) embeddings z_j of the positive cells, not normalised.
        anchor_similarity: (n, A) cosine similarities of each crop with the cells of its own image.
        anchors: bool (n, A): whether that cell is an anchor negative of the crop.
        image: int64 (n,), a number that identifies the image over all ranks.
        valid: bool (n,); invalid crops are not counted and not negatives.

    Returns:
        The loss of each crop, float32 (n,), 0 where invalid; and whether its positive is the most similar cell, bool (n,).
    """
    crops, cells = F.normalize(crops.float(), dim=-1), F.normalize(cells.float(), dim=-1)
    counts = row_counts(crops.shape[0])
    all_cells, all_images, all_valid = (
        gather_rows(cells, counts),
        gather_rows(image, counts),
        gather_rows(valid, counts),
    )
    other_image = (image[:, None] != all_images[None]) & all_valid[None]
    positive = (crops * cells).sum(-1, keepdim=True) / temperature

    inter = (crops @ all_cells.T / temperature).masked_fill(~other_image, -torch.inf)
    intra = (anchor_similarity.float() / temperature).masked_fill(~anchors, -torch.inf)
    logits = torch.cat([positive, inter, intra], dim=1)
    # An invalid row may hold NaN, which zeros keep out of the loss and of its gradient.
    logits = torch.where(valid[:, None], logits, torch.zeros_like(logits))
    loss = logits.logsumexp(1) - logits[:, 0]
    found = logits[:, 0] >= logits.max(1).values
    if symmetric:
        all_crops = gather_rows(crops, counts)
        back = (cells @ all_crops.T / temperature).masked_fill(~other_image, -torch.inf)
        back = torch.cat([positive, back], dim=1)
        back = torch.where(valid[:, None], back, torch.zeros_like(back))
        loss = (loss + back.logsumexp(1) - back[:, 0]) / 2
    return loss * valid, found & valid


class AnchorNTXent(nn.Module):
    """The networks of full views and of crops (figure 2 of the paper), and their loss."""

    def __init__(self, settings: AnchorNTXentConfig, backbone: BackboneConfig, *, crop_size: int, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.crop_size = crop_size
        self.seed = seed
        self.trunk = Trunk(backbone)
        self.pyramid = Pyramid(self.trunk.channels, settings.projection_dim, settings.levels)
        deepest = max(settings.crop_stages)
        self.crop_trunk = None if settings.shared_trunk else Trunk(backbone, deepest=deepest)
        widths = dict(zip(STAGES, self.trunk.channels, strict=True))
        self.projector = Projector(
            sum(widths[stage] for stage in settings.crop_stages), settings.projector_hidden, settings.projection_dim
        )
        # Embeddings of an untrained network are nearly parallel, so that all cosines are alike; centring separates them.
        centers = settings.center_embeddings and backbone.norm != "group"
        self.crop_center = embedding_norm(backbone.norm, settings.projection_dim) if centers else None
        self.level_centers = nn.ModuleDict(
            {level: embedding_norm(backbone.norm, settings.projection_dim) for level in settings.levels if centers}
        )

    def embed_grid(self, images: Tensor) -> FeaturePyramid:
        """Full views (B, 3, h, w) in [0, 1] to {level: (B, D, h/stride, w/stride)}."""
        pyramid = self.pyramid(self.trunk(imagenet_normalized(images)))
        return {n: self.level_centers[n](level) if self.level_centers else level for n, level in pyramid.items()}

    def embed_crops(self, crops: Tensor) -> Tensor:
        """Query crops (N, 3, h, w) in [0, 1] to (N, D); crops of another size than in training are resized to it first."""
        if crops.shape[-2:] != (self.crop_size, self.crop_size):
            size = (self.crop_size, self.crop_size)
            crops = F.interpolate(crops, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self._embed_crops(crops)

    def _embed_crops(self, crops: Tensor) -> Tensor:
        trunk = self.trunk if self.crop_trunk is None else self.crop_trunk
        stages = trunk(imagenet_normalized(crops))
        pooled = [stages[stage].mean((-2, -1)) for stage in self.settings.crop_stages]
        embeddings = self.projector(torch.cat(pooled, dim=-1))
        return embeddings if self.crop_center is None else self.crop_center(embeddings[..., None, None]).flatten(1)

    def after_update(self, step: int, steps: int) -> None:
        """Do nothing: all state is trained by gradient."""

    def forward(self, views: Views) -> StepResult:
        """The loss of this rank's views over the global batch, averaged over crops and levels."""
        return self.loss(self.embed(views), views)

    def embed(self, views: Views) -> dict[str, Tensor]:
        """The pyramid levels, each (B, D, h, w), and `crops`, (B, K, D)."""
        b, k = views.crops.shape[:2]
        pyramid = self.embed_grid(views.full)
        return {**pyramid, "crops": self._embed_crops(views.crops.flatten(0, 1)).reshape(b, k, -1)}

    def loss(self, embeddings: Mapping[str, Tensor], views: Views) -> StepResult:
        """The loss of the embeddings that `embed` returns, over the global batch."""
        pyramid = {name: level for name, level in embeddings.items() if name != "crops"}
        with torch.autocast(views.full.device.type, enabled=False):
            return self._loss(pyramid, embeddings["crops"].float(), views)

    def _loss(self, pyramid: FeaturePyramid, crops: Tensor, views: Views) -> StepResult:
        b, k, _ = crops.shape
        valid = views.valid[:, None].expand(b, k).flatten()
        image = views.positions[:, None].expand(b, k).flatten()
        total = crops.new_zeros(())
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for level, features in pyramid.items():
            cells, similarity, anchors = self._cells(level, features.float(), crops, views)
            loss, found = anchor_ntxent_loss(
                crops.flatten(0, 1),
                cells.flatten(0, 1),
                similarity.flatten(0, 1),
                anchors.flatten(0, 1),
                image,
                valid,
                temperature=self.settings.temperature,
                symmetric=self.settings.symmetric,
            )
            total = total + loss.sum()
            name = level.lower()
            sums[f"train/loss_{name}"] = (loss.sum(), valid.sum())
            sums[f"train/found_{name}"] = (found.sum(), valid.sum())
            sums[f"train/anchors_{name}"] = ((anchors.flatten(0, 1).sum(-1) * valid).sum(), valid.sum())
        loss = global_mean(total, valid.sum() * len(pyramid))
        metrics = averaged(sums)
        metrics["train/loss"] = torch.stack([metrics[f"train/loss_{level.lower()}"] for level in pyramid]).mean()
        return StepResult(loss=loss, metrics=metrics)

    def _cells(self, level: str, features: Tensor, crops: Tensor, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Positive cells (B, K, D), similarities with the cells of the anchors' grid (B, K, A), and whether each is an anchor."""
        grid_hw = (features.shape[-2], features.shape[-1])
        geometry, settings = views.geometry, self.settings
        index = cell_of(geometry.center_xy, grid_hw, geometry.full_size_hw)
        flat = features.flatten(2)
        positives = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)
        if settings.anchor_negatives == 0:
            none = crops.new_zeros((*crops.shape[:2], 0))
            return positives, none, none.bool()
        anchor_hw = grid_hw if settings.crop_grid == "native" else (settings.crop_grid, settings.crop_grid)
        cells = anchor_hw[0] * anchor_hw[1]
        if settings.anchor_negatives >= cells:
            draws = crops.new_zeros((*crops.shape[:2], cells))  # all available cells are chosen
        else:
            stream_id = stream(self.seed, "anchors", level, views.epoch)
            draws = uniform(stream_id, views.positions, crops.shape[1] * cells).reshape(*crops.shape[:2], cells)
        anchors = choose_anchors(geometry, anchor_hw, settings.anchor_negatives, draws)
        keys = F.normalize(embeddings_on_grid(features, anchor_hw), dim=1)
        similarity = torch.bmm(F.normalize(crops, dim=-1), keys)
        return positives, similarity, anchors
