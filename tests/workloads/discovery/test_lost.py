"""LOST and TokenCut against their slow restatements, and the corners of both."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.oracles.discovery import lost_box, tokencut_box
from workloads.discovery.components import FeaturesError, box_around, component_of, largest_component
from workloads.discovery.lost import LostConfig, lost, whole_map_norm
from workloads.discovery.tokencut import TokenCutConfig, tokencut

GRIDS = [(4, 5), (6, 6), (1, 9), (7, 1), (2, 3), (1, 1)]


def maps(kind: str, grid_hw: tuple[int, int], count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Feature maps (count, N, 6): noise, noise with a shared part, a block that is unlike its ground, or few values with ties."""
    rng = torch.Generator().manual_seed(seed)
    n = grid_hw[0] * grid_hw[1]
    noise = torch.randn(count, n, 6, generator=rng, dtype=torch.float64)
    if kind == "shared":
        noise += 0.7 * torch.randn(count, 1, 6, generator=rng, dtype=torch.float64)
    elif kind == "block":
        rows, columns = torch.arange(n) // grid_hw[1], torch.arange(n) % grid_hw[1]
        corner = torch.rand(count, 2, 1, generator=rng) * torch.tensor(grid_hw)[:, None]
        inside = (rows >= corner[:, 0]) & (columns >= corner[:, 1])
        axis = torch.eye(6, dtype=torch.float64)
        noise = 0.4 * noise + torch.where(inside[..., None], -axis[0] - axis[1], axis[0])
    elif kind == "ties":
        noise = noise.round()
    return noise.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["noise", "shared", "block", "ties"])
def test_lost_equals_its_steps(kind: str, dtype: torch.dtype) -> None:
    compared = 0
    for number, grid in enumerate(GRIDS):
        for k in (1, 3, 100):
            features = maps(kind, grid, 40, dtype, seed=100 * number + k)
            boxes = lost(features, grid, LostConfig(k=k)).boxes_xyxy.tolist()
            for box, one in zip(boxes, features.numpy(), strict=True):
                expected = lost_box(one, grid, k)
                if expected is not None:
                    compared += 1
                    assert tuple(box) == expected, (kind, grid, k)
    assert compared > 400  # of 720: the others have a similarity that rounding decides


def test_a_block_unlike_its_ground_is_found() -> None:
    features = torch.tensor([1.0, 0.0]).repeat(2, 30, 1)
    inside = [row * 6 + column for row in (1, 2) for column in (3, 4)]
    features[0, inside] = torch.tensor([-1.0, 0.5])
    features[1, [0, 29]] = torch.tensor([-1.0, 0.5])  # two corners: only the seed's own component counts
    found = lost(features, (5, 6))
    assert found.boxes_xyxy.tolist() == [[3, 1, 5, 3], [0, 0, 1, 1]]
    assert found.seeds.tolist() == [9, 0] and found.masks[0].sum() == 4
    torch.testing.assert_close(found.scores, torch.tensor([1 - 3 / 29, 1 - 1 / 29]))
    assert tokencut(features[:1], (5, 6)).boxes_xyxy.tolist() == [[3, 1, 5, 3]]


@pytest.mark.parametrize("method", [lost, tokencut])
def test_batch_order_is_irrelevant(method: object) -> None:
    features = torch.cat([maps(kind, (5, 6), 4, torch.float64, 7) for kind in ("noise", "shared", "block")])
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    found, shuffled = method(features, (5, 6)), method(features[order], (5, 6))
    assert torch.equal(found.boxes_xyxy[order], shuffled.boxes_xyxy)
    assert torch.equal(found.masks[order], shuffled.masks)
    alone = torch.cat([method(one[None], (5, 6)).boxes_xyxy for one in features])
    assert torch.equal(alone, found.boxes_xyxy)


@pytest.mark.parametrize("held", [2 * 20 * 20, 7 * 20, 1])
def test_a_large_batch_and_a_large_image_go_in_parts(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time, seven rows of A at a time, and one: the boxes of the oracle each time."""
    features = torch.cat([maps(kind, (4, 5), 20, torch.float64, 3) for kind in ("shared", "block", "ties")])
    monkeypatch.setattr("workloads.discovery.lost._LARGEST_CHUNK", held)
    compared = 0
    for k in (3, 100):
        boxes = lost(features, (4, 5), LostConfig(k=k)).boxes_xyxy.tolist()
        for box, one in zip(boxes, features.numpy(), strict=True):
            expected = lost_box(one, (4, 5), k)
            if expected is not None:
                compared += 1
                assert tuple(box) == expected, k
    assert compared > 60


def test_lost_holds_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of an image of 3,000 cells is a block of rows, not 3,000²."""
    monkeypatch.setattr("workloads.discovery.lost._LARGEST_CHUNK", 1 << 16)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            largest = max([largest, *[x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]])
            return result

    features = torch.randn(1, 3000, 8, generator=torch.Generator().manual_seed(0))
    with Largest():
        lost(features, (50, 60))
    assert largest <= 1 << 16


def test_half_precision_is_computed_in_float32() -> None:
    features = maps("block", (6, 6), 8, torch.float32, 5).half()
    assert torch.equal(lost(features, (6, 6)).boxes_xyxy, lost(features.float(), (6, 6)).boxes_xyxy)


@pytest.mark.parametrize("method", [lost, tokencut])
@pytest.mark.parametrize("value", [1.0, 0.0, -2.0])
def test_constant_features(method: object, value: float) -> None:
    found = method(torch.full((2, 12, 3), value), (3, 4))
    # All alike: the whole image. Zero vectors are similar to nothing: LOST's seed is alone, TokenCut's graph is even.
    expected = [0, 0, 1, 1] if value == 0 and method is lost else [0, 0, 4, 3]
    assert found.boxes_xyxy.tolist() == [expected] * 2
    assert found.seeds.tolist() == [0, 0]


@pytest.mark.parametrize("method", [lost, tokencut])
def test_no_image_and_what_is_refused(method: object) -> None:
    assert method(torch.zeros(0, 6, 3), (2, 3)).boxes_xyxy.shape == (0, 4)
    features = torch.ones(2, 6, 3)
    features[1, 2, 0] = torch.nan
    with pytest.raises(FeaturesError, match=r"image 1 of the batch .* not finite"):
        method(features, (2, 3))
    with pytest.raises(FeaturesError, match="are not"):
        method(torch.ones(2, 6, 3), (2, 4))


@pytest.mark.parametrize("kind", ["shared", "block"])
def test_tokencut_is_scipys_cut(kind: str) -> None:
    compared = 0
    for number, grid in enumerate([(4, 5), (6, 6), (1, 9), (7, 1)]):
        features = maps(kind, grid, 40, torch.float64, seed=number)
        boxes = tokencut(features, grid, TokenCutConfig(tau=0.2)).boxes_xyxy.tolist()
        for box, one in zip(boxes, features.numpy(), strict=True):
            expected = tokencut_box(one, grid, 0.2, 1e-5)
            if expected is not None:
                compared += 1
                assert tuple(box) == expected, (kind, grid)
    assert compared > 60


def test_components_do_not_reach_into_the_next_image() -> None:
    masks = torch.tensor([[[1, 0, 1], [1, 0, 0]], [[1, 1, 1], [0, 1, 1]]], dtype=torch.bool)
    found = component_of(masks, torch.tensor([0, 4]))
    assert found.tolist() == [[[True, False, False], [True, False, False]], [[True] * 3, [False, True, True]]]
    assert box_around(found).tolist() == [[0, 0, 1, 2], [0, 0, 3, 2]]
    lonely = component_of(masks, torch.tensor([1, 3]))  # cells that are not set: themselves alone
    assert lonely.flatten(1).sum(1).tolist() == [1, 1]


def test_the_largest_component_and_the_first_of_equals() -> None:
    masks = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)[:, None]
    boxes = box_around(largest_component(masks)).tolist()
    assert boxes == [[2, 0, 4, 1], [0, 0, 0, 0], [0, 0, 2, 1], [0, 0, 1, 1]]


def test_whole_map_norm_is_layer_norm() -> None:
    maps_ = torch.randn(3, 8, 4, 5).relu()
    expected = torch.stack([torch.nn.LayerNorm((20, 8), elementwise_affine=False)(m.flatten(1).T) for m in maps_])
    torch.testing.assert_close(whole_map_norm(maps_), expected)
    assert np.allclose(whole_map_norm(maps_).mean((1, 2)), 0, atol=1e-6)
