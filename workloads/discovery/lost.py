"""Finds one object an image by LOST (arXiv 2109.14279), `lost`: the object is where few other patches are alike.

Of an image's N patches with features F, the similarities are A = F Fᵀ. The *seed* is the patch that is similar (A > 0) to
the fewest others; the patches among the k of lowest degree that are similar to it vote with it; the component of the vote's
mask that holds the seed is the object. Nothing needs all of A at once: it is computed in blocks of rows, so that memory stays
bounded at any image size. Batched, with no loop over patches.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from workloads.config import config
from workloads.discovery.components import ObjectRegions, box_around, checked, component_of

_LARGEST_CHUNK = 1 << 26
"""Similarities held at a time, 256 MiB of float32: images of a batch, or rows of one image's A, beyond it go in parts."""


@config
class LostConfig:
    """Parameters of LOST."""

    k: PositiveInt = 100
    """Number of patches of lowest degree that may vote with the seed; of an image with fewer patches, all may."""


def lost(features: Tensor, grid_hw: tuple[int, int], settings: LostConfig | None = None) -> ObjectRegions:
    """One box an image.

    Ties of degree go to the patch that comes first, row by row. A seed without similarity even to itself (a zero vector) is a
    component by itself. The score, which the paper does not have, is 1 − the seed's share of similar patches.

    Args:
        features: (B, N, d), N = h · w row by row: a transformer's keys without CLS, or a CNN's map through `whole_map_norm`.

    Raises:
        FeaturesError: wrong shape, or not finite.
    """
    k = (settings or LostConfig()).k
    features = checked(features, grid_hw)
    b, n, _ = features.shape
    chunk = max(1, _LARGEST_CHUNK // (n * n))
    parts = [_seed_and_votes(part, k) for part in features.split(chunk)] if b else []
    if not parts:
        return _nothing(features, grid_hw)
    seeds, degrees, votes = (torch.cat(column) for column in zip(*parts, strict=True))
    masks = component_of(votes.unflatten(1, grid_hw), seeds)
    scores = 1 - degrees.float() / max(1, n - 1)
    return ObjectRegions(boxes_xyxy=box_around(masks), masks=masks, seeds=seeds, scores=scores)


def _seed_and_votes(features: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds (B,), their degrees (B,) and the mask that was voted for, bool (B, N)."""
    degrees = _degrees(features)
    least = degrees.argsort(dim=1, stable=True)[:, :k]
    seeds = least[:, 0]
    similar_to_seed = _similarities(features, least[:, :1])[:, 0] > 0
    votes = features.new_zeros(features.shape[:2])
    for some in least.split(_block(features), dim=1):
        voters = similar_to_seed.gather(1, some)
        votes += (voters[:, None].to(features.dtype) @ _similarities(features, some))[:, 0]
    return seeds, degrees.gather(1, seeds[:, None])[:, 0], votes > 0


def _block(features: Tensor) -> int:
    """Rows of A, of all images of (B, N, d), that are held at a time."""
    return max(1, _LARGEST_CHUNK // (features.shape[0] * features.shape[1]))


def _similarities(features: Tensor, rows: Tensor) -> Tensor:
    """(B, r, N): the rows int64 (B, r) of A."""
    some = features.gather(1, rows[:, :, None].expand(-1, -1, features.shape[2]))
    return some @ features.mT


def _degrees(features: Tensor) -> Tensor:
    """int64 (B, N): how many other patches each patch is similar to."""
    degrees: list[Tensor] = []
    first = 0
    for some in features.split(_block(features), dim=1):
        alike = some @ features.mT > 0
        degrees.append(alike.sum(-1) - alike.diagonal(offset=first, dim1=1, dim2=2).long())
        first += some.shape[1]
    return torch.cat(degrees, dim=1)


def _nothing(features: Tensor, grid_hw: tuple[int, int]) -> ObjectRegions:
    zeros = torch.zeros(0, dtype=torch.int64, device=features.device)
    masks = zeros.new_zeros((0, *grid_hw), dtype=torch.bool)
    return ObjectRegions(boxes_xyxy=zeros.new_zeros((0, 4)), masks=masks, seeds=zeros, scores=zeros.float())


def whole_map_norm(maps: Tensor) -> Tensor:
    """A CNN's last map (B, C, h, w) as features (B, h·w, C), less its mean and divided by its deviation, both over all of the map.

    LayerNorm without scale and shift: a map after a ReLU has no negative similarities before.
    """
    features = maps.flatten(2).mT.float()
    return torch.nn.functional.layer_norm(features, features.shape[1:])
