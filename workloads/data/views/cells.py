"""Functions on the cells of a grid over a view: the cell of a point, the cells in a box, the image region that a cell shows."""

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
    x, y = cell_centers(grid_hw, size_hw, box_xyxy.device).unbind(-1)
    half_width, half_height = size_hw[1] / grid_hw[1] / 2, size_hw[0] / grid_hw[0] / 2
    x0, y0, x1, y1 = box_xyxy[..., None, :].unbind(-1)
    inside_x = (x - half_width >= x0) & (x + half_width <= x1)
    return inside_x & (y - half_height >= y0) & (y + half_height <= y1)


def one_hot_cell(index: Tensor, cells: int) -> Tensor:
    """bool (..., cells): True at `index` (...)."""
    return index[..., None] == torch.arange(cells, device=index.device)


def source_pixels(start: Tensor, stop: Tensor, mirrored: Tensor, size: int, extent: Tensor) -> Tensor:
    """int64 (B, V, size): the pixel of an image axis that each of a view's `size` pixels shows, by nearest sampling.

    Args:
        start, stop: (B, V), interval of the axis that the view shows, pixels.
        mirrored: bool (B, V).
        extent: int64 (B, 1), length of the image on this axis, pixels.
    """
    out = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    out = torch.where(mirrored[..., None], size - out, out)
    pixel = (start[..., None] + out * ((stop - start) / size)[..., None]).floor().long()
    return torch.minimum(pixel.clamp(min=0), extent[..., None] - 1)


def grid_regions(y: Tensor, x: Tensor, content_hw: Tensor, grid: int) -> Tensor:
    """int64 (B, V, h, w): the cell, from 1 to grid², of a grid over the image that holds pixels `y` (B, V, h) and `x` (B, V, w)."""

    def cell(pixel: Tensor, extent: Tensor) -> Tensor:
        return ((2 * pixel + 1) * grid // (2 * extent[:, None, None])).clamp(max=grid - 1)

    row, column = cell(y, content_hw[:, 0]), cell(x, content_hw[:, 1])
    return 1 + row[..., :, None] * grid + column[..., None, :]


def pool_regions(pixels: Tensor, grid: int, num_regions: int) -> Tensor:
    """The region with the most pixels in each cell; on a tie, the lowest number.

    Equals one-hot, average pooling and argmax (arXiv 2103.10957), without the one-hot planes.

    Args:
        pixels: int64 (N, h, w), numbers from 0 to `num_regions`; h and w are multiples of `grid`.

    Returns:
        int64 (N, grid, grid).
    """
    n, height, width = pixels.shape
    kinds = num_regions + 1
    row = torch.arange(height, device=pixels.device) * grid // height
    column = torch.arange(width, device=pixels.device) * grid // width
    cell = row[:, None] * grid + column
    counts = torch.zeros(n, grid * grid * kinds, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(1, (cell * kinds + pixels).flatten(1), torch.ones_like(pixels).flatten(1))
    # Exact in integers, and the lowest number wins a tie on every device, which argmax does not promise.
    ranked = counts.unflatten(1, (grid * grid, kinds)) * kinds + torch.arange(kinds - 1, -1, -1, device=pixels.device)
    return ranked.argmax(-1).unflatten(1, (grid, grid))
