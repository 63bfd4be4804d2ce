"""Pascal VOC's average precision as the development kit computes it: inclusive pixel coordinates, one detection at a time."""

from collections.abc import Sequence


def voc_ap(
    detections: Sequence[tuple[int, float, tuple[float, float, float, float]]],
    objects: Sequence[tuple[int, bool, tuple[float, float, float, float]]],
    threshold: float,
    *,
    eleven_points: bool,
) -> float:
    """AP of one class.

    Args:
        detections: image, score, inclusive box (xmin, ymin, xmax, ymax), no two of one score.
        objects: image, whether it is difficult, inclusive box.
    """
    positives = sum(not difficult for _, difficult, _ in objects)
    taken: set[int] = set()
    true, false = [], []
    for image, _, box in sorted(detections, key=lambda d: -d[1]):
        best, index = -1.0, -1
        for j, (where, _, other) in enumerate(objects):
            if where != image:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            inner = width * height if width > 0 and height > 0 else 0.0
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            area += (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
            overlap = inner / (area - inner)
            if overlap > best:
                best, index = overlap, j
        if best > threshold:
            if objects[index][1]:
                continue
            true.append(index not in taken)
            false.append(index in taken)
            taken.add(index)
        else:
            true.append(False)
            false.append(True)
    recalls, precisions = [], []
    for i in range(1, len(true) + 1):
        recalls.append(sum(true[:i]) / positives)
        precisions.append(sum(true[:i]) / (sum(true[:i]) + sum(false[:i])))
    if eleven_points:
        total = 0.0
        for k in range(11):
            total += max((p for r, p in zip(recalls, precisions, strict=True) if r >= k * 0.1), default=0.0)
        return total / 11
    area, previous = 0.0, 0.0
    for i, recall in enumerate(recalls):
        area += (recall - previous) * max(precisions[i:])
        previous = recall
    return area
