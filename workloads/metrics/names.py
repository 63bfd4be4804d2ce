"""`MetricName`: the parts of the key of an evaluation metric, `eval/[on_DATASET/][GROUP/]FIGURE`."""

import dataclasses
from dataclasses import dataclass

_PREFIX, _DATASET, _PLAIN = "eval", "on_", "plain"


@dataclass(frozen=True, slots=True)
class MetricName:
    """One evaluation metric; `str` gives its key."""

    figure: str  # as sga, sga_p3, corloc_low
    group: str = _PLAIN  # suite, discovery method or task; `plain` is left out of the key
    dataset: str | None = None  # label of a dataset other than the run's own evaluation set

    @classmethod
    def parse(cls, key: str) -> "MetricName":
        """The parts of `key`.

        Raises:
            ValueError: it is no key of an evaluation metric.
        """
        prefix, *parts = key.split("/")
        dataset = parts.pop(0).removeprefix(_DATASET) if parts and parts[0].startswith(_DATASET) else None
        if prefix != _PREFIX or not all(parts) or not parts:
            raise ValueError(f"{key}: expected eval/[on_DATASET/][GROUP/]FIGURE")
        group = parts.pop(0) if len(parts) > 1 else _PLAIN
        return cls("/".join(parts), group, dataset)

    def on(self, dataset: str | None) -> "MetricName":
        """The same metric, measured on the dataset with this label; None: on the run's own evaluation set."""
        return dataclasses.replace(self, dataset=dataset)

    def __str__(self) -> str:
        dataset = [] if self.dataset is None else [_DATASET + self.dataset]
        group = [] if self.group == _PLAIN else [self.group]
        return "/".join([_PREFIX, *dataset, *group, self.figure])
