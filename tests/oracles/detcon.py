"""Restates DetCon with loops in float64: the cells of each region, and its contrast with all others."""

import math


def cell_regions(pixels, grid):
    """The most frequent number in each of grid × grid cells of a square list of rows; of several, the lowest."""
    side = len(pixels) // grid
    cells = []
    for row in range(grid):
        line = []
        for column in range(grid):
            seen = [
                pixels[y][x]
                for y in range(row * side, (row + 1) * side)
                for x in range(column * side, (column + 1) * side)
            ]
            line.append(min(set(seen), key=lambda number: (-seen.count(number), number)))
        cells.append(line)
    return cells


def loss(online, target, regions, valid, temperature):
    """The sum over both views of the mean over regions of weight times cross-entropy.

    online[i][v][m], target[i][v][m]: vectors of image i, view v; regions[i][v][m]: region numbers, 0 for none.
    """

    def unit(vector):
        norm = math.sqrt(sum(x * x for x in vector))
        return [x / norm for x in vector]

    def sim(a, b):
        return sum(x * y for x, y in zip(unit(a), unit(b), strict=True)) / temperature

    images, drawn = len(online), len(regions[0][0])
    total = 0.0
    for v in (0, 1):
        view_sum = 0.0
        for i in range(images):
            for m in range(drawn):
                mine = regions[i][v][m]
                if not valid[i] or mine == 0:
                    continue
                logits, positive = [], []
                for j in range(images):
                    for u in (0, 1):
                        for n in range(drawn):
                            other = regions[j][u][n]
                            if not valid[j] or other == 0:
                                continue
                            if j == i and u == v and other == mine:
                                continue
                            logits.append(sim(online[i][v][m], target[j][u][n]))
                            positive.append(j == i and u != v and other == mine)
                if not any(positive):
                    continue
                log_sum = math.log(sum(math.exp(x) for x in logits))
                share = 1 / sum(positive)
                entropy = -sum(share * (x - log_sum) for x, p in zip(logits, positive, strict=True) if p)
                view_sum += entropy / regions[i][v].count(mine)
        total += view_sum / (sum(valid) * drawn)
    return total
