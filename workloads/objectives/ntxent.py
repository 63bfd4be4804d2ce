"""Implements NT-Xent over two views of each image (`NTXent`, SimCLR, arXiv 2002.05709): the baseline without localisation."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config
from workloads.models.backbone import BackboneConfig, imagenet_normalized, make_trunk
from workloads.models.heads import Projector
from workloads.parallel.distributed import averaged, gather_rows, global_mean, row_counts
from workloads.types import PairViews, StepResult


@config
class NTXentConfig:
    """Settings of NT-Xent; all of them can be swept."""

    kind: Literal["ntxent"] = "ntxent"
    """Name of the objective."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature τ; cosine similarities are divided by it."""
    projection_dim: Annotated[int, Field(ge=8)] = 128
    """Channels of the embedding."""
    projector_hidden: Annotated[int, Field(ge=8)] = 2048
    """Hidden width of the projector."""


def ntxent_loss(views: Tensor, image: Tensor, valid: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """−log(e^{sim(z_i,z_j)/τ} / Σ_{k≠i} e^{sim(z_i,z_k)/τ}) of this rank's views over the global batch (eq. 1 of SimCLR).

    Computed in float32 with log-sum-exp for any input precision.

    Args:
        views: (b, 2, D) embeddings, not normalised.
        image: int64 (b,), a number that identifies the image over all ranks.
        valid: bool (b,); invalid images are not counted and not negatives.

    Returns:
        The loss of each view, float32 (b, 2), 0 where invalid; and whether the other view is the most similar, bool (b, 2).
    """
    # An invalid row may hold NaN, which zeros keep out of the loss and of its gradient.
    views = F.normalize(views.float().masked_fill(~valid[:, None, None], 0.0), dim=-1)
    counts = row_counts(views.shape[0])
    everyone, images, valids = gather_rows(views, counts), gather_rows(image, counts), gather_rows(valid, counts)
    positive = (views[:, 0] * views[:, 1]).sum(-1) / temperature
    positive = positive[:, None, None].expand(-1, 2, -1)
    similarity = torch.einsum("bvd,nud->bvnu", views, everyone) / temperature
    negative = ((image[:, None] != images) & valids)[:, None, :, None]
    logits = torch.cat([positive, similarity.masked_fill(~negative, -torch.inf).flatten(2)], dim=-1)
    loss = logits.logsumexp(-1) - logits[..., 0]
    found = logits[..., 0] >= logits.max(-1).values
    return loss * valid[:, None], found & valid[:, None]


class NTXent(nn.Module):
    """A trunk and its projector; both views of all images are one batch."""

    def __init__(self, settings: NTXentConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.settings = settings
        self.trunk = make_trunk(backbone)
        self.projector = Projector(
            self.trunk.num_features, settings.projector_hidden, settings.projection_dim, norm=backbone.norm
        )

    def forward(self, views: PairViews) -> StepResult:
        """The loss of this rank's views over the global batch, averaged over views."""
        return self.loss(self.embed(views), views)

    def embed(self, views: PairViews) -> dict[str, Tensor]:
        """`views`: (B, 2, D)."""
        features = self.trunk.pooled(imagenet_normalized(views.images.flatten(0, 1)))
        return {"views": self.projector(features).unflatten(0, (-1, 2))}

    def loss(self, embeddings: Mapping[str, Tensor], views: PairViews) -> StepResult:
        """The loss of the embeddings that `embed` returns, over the global batch."""
        with torch.autocast(views.valid.device.type, enabled=False):
            loss, found = ntxent_loss(
                embeddings["views"], views.positions, views.valid, temperature=self.settings.temperature
            )
            count = 2 * views.valid.sum()
            metrics = averaged({"train/loss": (loss.sum(), count), "train/found": (found.sum(), count)})
            return StepResult(loss=global_mean(loss.sum(), count), metrics=metrics)

    def after_update(self, step: int, steps: int) -> None:
        """Do nothing: all state is trained by gradient."""
