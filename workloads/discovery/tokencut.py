"""Finds one object an image by TokenCut (arXiv 2202.11539), `tokencut`: one side of the normalised cut of the patches' graph.

Patches are joined by weight 1 where the cosine of their features exceeds tau, by `eps` elsewhere. The eigenvector of the
second smallest eigenvalue of (D − A) x = λ D x is cut at its mean; the object is the side with the largest absolute value,
and of it the component that holds that patch.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from workloads.config import config
from workloads.discovery.components import ObjectRegions, box_around, checked, component_of


@config
class TokenCutConfig:
    """Parameters of TokenCut's graph."""

    tau: float = Field(default=0.2, ge=-1, le=1)
    """Cosine above which the edge between two patches has weight 1."""
    eps: PositiveFloat = 1e-5
    """Weight of all other edges, which keeps the graph connected."""


def tokencut_bytes(cells: int) -> int:
    """Memory that `tokencut` needs for an image of `cells` patches: the graph, its scaled form and its eigenvectors."""
    return 48 * cells**2  # measured: 43 bytes a pair, at 2,500 and 3,600 cells on a CPU


def tokencut(features: Tensor, grid_hw: tuple[int, int], settings: TokenCutConfig | None = None) -> ObjectRegions:
    """One box an image, as from `lost`; the score is 1. In float64, because eps is small beside a degree.

    An image whose edges all have one weight has no cut: its box is the whole image.

    Args:
        features: (B, N, d), N = h · w row by row.

    Raises:
        FeaturesError: wrong shape, or not finite.
    """
    settings = settings or TokenCutConfig()
    features = F.normalize(checked(features, grid_hw).double(), dim=-1)
    # One image at a time, to bound memory; eigh takes a batch one by one anyway.
    parts = [_cut(part, settings) for part in features.split(1)]
    if not parts:
        parts = [(features.new_zeros(0, dtype=torch.int64), features.new_zeros(features.shape[:2], dtype=torch.bool))]
    seeds, sides = (torch.cat(column) for column in zip(*parts, strict=True))
    masks = component_of(sides.unflatten(1, grid_hw), seeds)
    scores = torch.ones(len(features), device=features.device)
    return ObjectRegions(boxes_xyxy=box_around(masks), masks=masks, seeds=seeds, scores=scores)


def _cut(features: Tensor, settings: TokenCutConfig) -> tuple[Tensor, Tensor]:
    """Seeds (B,) and the object's side, bool (B, N), of unit features."""
    joined = features @ features.mT > settings.tau
    weights = joined.double().clamp_(min=settings.eps)
    scale = weights.sum(-1).rsqrt()
    # x = D^-½ y, where y is an eigenvector of D^-½ A D^-½; the smallest λ of the pencil are its largest.
    _, vectors = torch.linalg.eigh(weights * scale[:, :, None] * scale[:, None, :])
    if vectors.shape[-1] == 1:
        return torch.zeros_like(joined[:, 0, 0], dtype=torch.int64), torch.ones_like(joined[:, 0])
    second = vectors[..., -2] * scale
    side = second > second.mean(1, keepdim=True)
    seeds = second.abs().argmax(1)
    side = side == side.gather(1, seeds[:, None])
    whole = (joined == joined[:, :1, :1]).flatten(1).all(1)
    return seeds.masked_fill(whole, 0), side | whole[:, None]
