"""Restates grid accuracy with loops: the best cell, whether it is a hit, and the colour-statistics baseline."""

import math


def best_cell(values):
    """(row, column) of the first greatest value of a list of rows."""
    found = (0, 0)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value > values[found[0]][found[1]]:
                found = (row, column)
    return found


def counts(row, column, box, grid, size):
    """Whether the cell's centre lies inside the half-open box, or the cell holds the box's centre."""
    cell = size / grid
    x, y = (column + 0.5) * cell, (row + 0.5) * cell
    if box[0] <= x < box[2] and box[1] <= y < box[3]:
        return True
    return int((box[0] + box[2]) / 2 // cell) == column and int((box[1] + box[3]) / 2 // cell) == row


def lies_wholly_inside(row, column, box, grid, size):
    """Whether all of the cell lies inside the box."""
    cell = size / grid
    x, y = column * cell, row * cell
    return box[0] <= x and x + cell <= box[2] and box[1] <= y and y + cell <= box[3]


def chance(box, grid, size):
    """Share of the cells that would count."""
    return sum(counts(r, c, box, grid, size) for r in range(grid) for c in range(grid)) / grid**2


def colour_statistics(pixels):
    """Mean and deviation of each channel of [channel][pixel]."""
    means = [sum(channel) / len(channel) for channel in pixels]
    squares = [sum(v * v for v in channel) / len(channel) for channel in pixels]
    return means + [math.sqrt(max(s - m * m, 0.0)) for s, m in zip(squares, means, strict=True)]


def pixel_distance(crop, full, window, grid, row, column):
    """Distance of colour statistics between `crop` and the window on one cell's centre; both [channel][y][x]."""
    size = len(full[0])
    y, x = (row + 0.5) * size / grid, (column + 0.5) * size / grid
    rows = range(max(0, round(y - window / 2)), min(size, round(y + window / 2)))
    columns = range(max(0, round(x - window / 2)), min(size, round(x + window / 2)))
    there = colour_statistics([[channel[r][c] for r in rows for c in columns] for channel in full])
    here = colour_statistics([[v for line in channel for v in line] for channel in crop])
    return math.dist(here, there)
