"""Restates DetCo with loops in float64: three contrasts at each level, and queues as plain lists."""

import math


def contrast(query, key, queue, temperature):
    """−log of the key's share among the key and the queue; vectors are normalised already."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    positive = math.exp(dot(query, key) / temperature)
    negative = sum(math.exp(dot(query, other) / temperature) for other in queue)
    return -math.log(positive / (positive + negative))


def loss(queries, keys, queues, valid, level_weights, temperature):
    """queries, keys: [image][kind][level] vectors, kind 0 global and 1 local; queues: [kind][level] lists of vectors."""
    total = 0.0
    for i in range(len(queries)):
        if not valid[i]:
            continue
        for level, weight in enumerate(level_weights):
            for of_query, of_key in ((0, 0), (1, 1), (1, 0)):
                total += weight * contrast(
                    queries[i][of_query][level], keys[i][of_key][level], queues[of_key][level], temperature
                )
    return total / sum(valid)


class Queue:
    """The newest `size` keys; where each stands does not matter to the loss."""

    def __init__(self, size):
        self.size, self.keys = size, []

    def push(self, keys):
        self.keys = (self.keys + list(keys))[-self.size :]
