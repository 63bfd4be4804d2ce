"""Implements DetCon (`DetCon`, arXiv 2103.10957): a region is attracted to itself in the other view, repelled from all others.

DetCon-S contrasts projections, with gradient on both sides. DetCon-B contrasts a predictor's output with the projections of an
EMA target. Deviations from the paper: both views go through the trunk in one batch, and so share batch statistics; views
without a region and rows that did not decode are not negatives.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config
from workloads.data.views.counter_random import stream, uniform
from workloads.models.backbone import BackboneConfig, Trunk, imagenet_normalized
from workloads.models.heads import Projector
from workloads.models.momentum import cosine_momentum, follow, target_of
from workloads.parallel.distributed import averaged, gather_rows, global_mean, row_counts
from workloads.types import PairViews, StepResult


@config
class DetConConfig:
    """Settings of DetCon; all of them can be swept."""

    kind: Literal["detcon"] = "detcon"
    """Name of the objective."""
    variant: Literal["S", "B"] = "B"
    """S: contrast of two projections; B: of a prediction with the projection of an EMA target."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature τ; cosine similarities are divided by it."""
    regions_per_view: Annotated[int, Field(ge=1)] = 16
    """Regions drawn from each view, with replacement."""
    projection_dim: Annotated[int, Field(ge=8)] = 256
    """Channels of the embedding."""
    projector_hidden: Annotated[int, Field(ge=8)] = 4096
    """Hidden width of projector and predictor."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """EMA momentum of B's target at the first update; it rises to 1 along a cosine."""


def draw_regions(cells: Tensor, num_regions: int, draws: Tensor) -> Tensor:
    """Draw regions of each view, with replacement, from those of its cells.

    Args:
        cells: int64 (N, g, g), numbers from 0 (none) to `num_regions`.
        draws: float32 (N, M) in [0, 1).

    Returns:
        int64 (N, M); 0 for a view without a region.
    """
    present = torch.zeros(len(cells), num_regions + 1, dtype=torch.int64, device=cells.device)
    present.scatter_(1, cells.flatten(1), 1)
    present[:, 0] = 0
    order = present.cumsum(1)
    shown = order[:, -1:]
    wanted = torch.minimum((draws * shown).long() + 1, shown)
    found = torch.searchsorted(order, wanted)
    return found.masked_fill(shown == 0, 0)


def pool_by_region(features: Tensor, cells: Tensor, regions: Tensor) -> Tensor:
    """The mean of a feature map over each region's cells.

    Args:
        features: (N, C, g, g). cells: int64 (N, g, g). regions: int64 (N, M).

    Returns:
        (N, M, C); zeros for a region without a cell.
    """
    masks = (cells.flatten(1)[:, None] == regions[..., None]).to(features.dtype)
    return torch.bmm(masks, features.flatten(2).transpose(1, 2)) / masks.sum(-1, keepdim=True).clamp(min=1)


def detcon_loss(
    online: Tensor, target: Tensor, regions: Tensor, image: Tensor, valid: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The contrast of this rank's regions with those of the global batch (eq. 1 and 2 of the paper).

    Positives of a region are the same region of the same image in the other view, which share one soft target. The same region
    in its own view is excluded; everything else is negative. Computed in float32 with log-sum-exp for any input precision.

    Args:
        online: (b, 2, M, D) embeddings of the regions drawn from both views, not normalised; rows of the loss.
        target: (b, 2, M, D) embeddings that they are compared with, not normalised.
        regions: int64 (b, 2, M), numbers of the regions within their image; 0: the view has none.
        image: int64 (b,), a number that identifies the image over all ranks.
        valid: bool (b,).

    Returns:
        The loss of each region, float32 (b, 2, M), divided by the number of times that it was drawn from its view, 0 without a
        positive; and whether it has one, bool (b, 2, M).
    """
    shown = (regions > 0) & valid[:, None, None]
    # An invalid row may hold NaN, which zeros keep out of the loss and of its gradient.
    online, target = (F.normalize(x.float().masked_fill(~shown[..., None], 0.0), dim=-1) for x in (online, target))
    counts = row_counts(online.shape[0])
    everyone, images, all_shown = (gather_rows(x, counts) for x in (target, image, shown))

    same_region = regions[:, 0, :, None] == regions[:, 1, None, :]  # rows of no region are not counted below
    positives = torch.stack([same_region, same_region.transpose(1, 2)], dim=1)  # (b, 2, M, M)
    num_positives = positives.sum(-1)
    own = torch.einsum("bvmd,bvkd->bvmk", online, target.flip(1)) / temperature
    attracted = own.masked_fill(~positives, 0.0).sum(-1) / num_positives.clamp(min=1)

    similarity = torch.einsum("bvmd,nukd->bvmnuk", online, everyone) / temperature
    # Same image, same view, same region: the region itself, once for each time that it was drawn.
    itself = regions[..., :, None] == regions[..., None, :]  # (b, 2, M, M)
    is_own = image[:, None] == images  # (b, N)
    same_view = torch.eye(2, dtype=torch.bool, device=online.device)
    left_out = is_own[:, None, None, :, None, None] & same_view[:, None, None, :, None] & itself[:, :, :, None, None, :]
    similarity = similarity.masked_fill(left_out | ~all_shown, -torch.inf).flatten(3)
    counted = shown & (num_positives > 0)
    # A row that is not counted may have no finite similarity, whose log-sum-exp would be −inf.
    similarity = torch.where(counted[..., None], similarity, torch.zeros_like(similarity))
    times_drawn = itself.sum(-1)
    loss = (similarity.logsumexp(-1) - attracted) / times_drawn
    return torch.where(counted, loss, torch.zeros_like(loss)), counted


class DetCon(nn.Module):
    """Trunk and projector; in variant B also predictor and EMA target."""

    def __init__(self, settings: DetConConfig, backbone: BackboneConfig, *, seed: int) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        self.trunk = Trunk(backbone)
        width, hidden, dim = self.trunk.num_features, settings.projector_hidden, settings.projection_dim
        self.projector = Projector(width, hidden, dim, norm=backbone.norm, bias=False)
        self.predictor: nn.Module | None = None
        self.target: nn.ModuleDict | None = None
        if settings.variant == "B":
            self.predictor = Projector(dim, hidden, dim, norm=backbone.norm, bias=False)
            self.target = nn.ModuleDict({"trunk": target_of(self.trunk), "projector": target_of(self.projector)})

    def forward(self, views: PairViews) -> StepResult:
        """The loss of this rank's views over the global batch: the sum over both views of the mean over regions."""
        return self.loss(self.embed(views), views)

    def embed(self, views: PairViews) -> dict[str, Tensor]:
        """`online` and, in B, `target`: (B, 2, M, D)."""
        images = imagenet_normalized(views.images.flatten(0, 1))
        regions = self._regions(views)
        online = self._project(self.trunk, self.projector, images, views, regions)
        if self.predictor is None or self.target is None:
            return {"online": online}
        with torch.no_grad():
            target = self._project(self.target["trunk"], self.target["projector"], images, views, regions)
        return {"online": self.predictor(online.flatten(0, 2)).view_as(online), "target": target}

    def _regions(self, views: PairViews) -> Tensor:
        """The regions drawn from each view, int64 (B, 2, M), by (seed, epoch, position)."""
        assert views.regions is not None
        count = self.settings.regions_per_view
        draws = uniform(stream(self.seed, "regions", views.epoch), views.positions, 2 * count)
        drawn = draw_regions(views.regions.flatten(0, 1), views.num_regions, draws.reshape(-1, count))
        return drawn.unflatten(0, (-1, 2))

    def _project(
        self, trunk: nn.Module, projector: nn.Module, images: Tensor, views: PairViews, regions: Tensor
    ) -> Tensor:
        assert views.regions is not None
        pooled = pool_by_region(trunk(images)["C5"], views.regions.flatten(0, 1), regions.flatten(0, 1))
        return projector(pooled.flatten(0, 1)).reshape(*regions.shape, -1)

    def loss(self, embeddings: Mapping[str, Tensor], views: PairViews) -> StepResult:
        """The loss of the embeddings that `embed` returns, over the global batch."""
        online = embeddings["online"]
        target = embeddings["target"].detach() if "target" in embeddings else online
        with torch.autocast(online.device.type, enabled=False):
            loss, counted = detcon_loss(
                online,
                target,
                self._regions(views),
                views.positions,
                views.valid,
                temperature=self.settings.temperature,
            )
            count = views.valid.sum() * self.settings.regions_per_view
            sums = {
                "train/loss": (loss.sum(), count),
                "train/regions_paired": (counted.sum(), 2 * count),
            }
            return StepResult(loss=global_mean(loss.sum(), count), metrics=averaged(sums))

    @torch.no_grad()
    def after_update(self, step: int, steps: int) -> None:
        """Update the EMA target; `step` of `steps` updates were done before this one."""
        if self.target is not None:
            momentum = cosine_momentum(self.settings.momentum, step, steps)
            follow(self.target["trunk"], self.trunk, momentum)
            follow(self.target["projector"], self.projector, momentum)
