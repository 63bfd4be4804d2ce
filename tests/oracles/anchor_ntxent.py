"""Restates anchor NT-Xent and its choice of cells with loops in float64."""

import math


def loss(crops, cells, level_cells, anchor_cells, image, valid, temperature, symmetric=False):
    """Mean over valid crops.

    crops, cells: lists of vectors; level_cells[i]: the vectors of all cells of crop i's image; anchor_cells[i]: which of
    those are anchor negatives; image[i]: which image crop i is from.
    """

    def sim(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)))

    total, count = 0.0, 0
    for i in range(len(crops)):
        if not valid[i]:
            continue
        own = math.exp(sim(crops[i], cells[i]) / temperature)
        denominator = own
        for k in range(len(crops)):
            if valid[k] and image[k] != image[i]:
                denominator += math.exp(sim(crops[i], cells[k]) / temperature)
        for a in anchor_cells[i]:
            denominator += math.exp(sim(crops[i], level_cells[i][a]) / temperature)
        one = -math.log(own / denominator)
        if symmetric:
            denominator = own
            for k in range(len(crops)):
                if valid[k] and image[k] != image[i]:
                    denominator += math.exp(sim(cells[i], crops[k]) / temperature)
            one = (one - math.log(own / denominator)) / 2
        total += one
        count += 1
    return total / count


def available_anchors(box, grid, size):
    """Row-major indices of the cells whose centre is outside `box` and that do not hold the box's centre."""
    cell = size / grid
    center_column, center_row = (box[0] + box[2]) / 2 // cell, (box[1] + box[3]) / 2 // cell
    found = []
    for row in range(grid):
        for column in range(grid):
            x, y = (column + 0.5) * cell, (row + 0.5) * cell
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            if not inside and (row, column) != (center_row, center_column):
                found.append(row * grid + column)
    return found
