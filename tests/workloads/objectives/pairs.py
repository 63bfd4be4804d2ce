"""Pair views made for tests."""

import torch

from workloads.types import PairGeometry, PairViews


def pair_views_of(
    n: int, *, size: int = 64, regions: int = 5, patches: int | None = None, seed: int = 0, last_is_valid: bool = True
) -> PairViews:
    """Random views of `n` images, each cell of one of `regions` regions, some cells of none."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(n, dtype=torch.bool)
    valid[-1] = last_is_valid
    return PairViews(
        images=torch.rand(n, 2, 3, size, size, generator=g),
        geometry=PairGeometry(box_xyxy=torch.zeros(n, 2, 4), flips=torch.zeros(n, 2, 2, dtype=torch.bool)),
        valid=valid,
        positions=torch.arange(n),
        epoch=1,
        regions=torch.randint(0, regions + 1, (n, 2, size // 32, size // 32), generator=g),
        num_regions=regions,
        patches=None if patches is None else torch.rand(n, 2, patches, 3, 32, 32, generator=g),
    )
