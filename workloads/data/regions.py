"""Grids over a view: which cell holds a point, where cells' centres are, which cells a crop does not cover."""

import torch
from torch import Tensor


def cell_centers(grid_hw: tuple[int, int], size_hw: tuple[int, int], device: torch.device) -> Tensor:
    """float32 (h·w, 2): xy of every cell's centre in pixels of a view of `size_hw`, row by row."""
    y = (torch.arange(grid_hw[0], device=device, dtype=torch.float32) + 0.5) * (size_hw[0] / grid_hw[0])
    x = (torch.arange(grid_hw[1], device=device, dtype=torch.float32) + 0.5) * (size_hw[1] / grid_hw[1])
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([xx, yy], dim=-1).reshape(-1, 2)


def cell_of(points_xy: Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """int64 (...): the row-major index of the cell that holds each point (..., 2); cells are half-open, the last closed."""
    column = (points_xy[..., 0] * (grid_hw[1] / size_hw[1])).floor().long().clamp(0, grid_hw[1] - 1)
    row = (points_xy[..., 1] * (grid_hw[0] / size_hw[0])).floor().long().clamp(0, grid_hw[0] - 1)
    return row * grid_hw[1] + column


def centers_inside(box_xyxy: Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """bool (..., h·w): whether each cell's centre lies in the half-open box (..., 4)."""
    x, y = cell_centers(grid_hw, size_hw, box_xyxy.device).unbind(-1)
    x0, y0, x1, y1 = box_xyxy[..., None, :].unbind(-1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def cells_inside(box_xyxy: Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """bool (..., h·w): whether each cell lies wholly in the box (..., 4)."""
    centers = cell_centers(grid_hw, size_hw, box_xyxy.device)
    half = centers.new_tensor([size_hw[1] / grid_hw[1], size_hw[0] / grid_hw[0]]) / 2
    low, high = centers - half, centers + half
    box = box_xyxy[..., None, :]
    return ((low >= box[..., :2]) & (high <= box[..., 2:])).all(-1)


def one_hot_cell(index: Tensor, cells: int) -> Tensor:
    """bool (..., cells): True at `index` (...)."""
    return index[..., None] == torch.arange(cells, device=index.device)
