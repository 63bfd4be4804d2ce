"""Reports that a worker has made and the driver may not have: its node may be lost, a newer checkpoint than they are may not.

They travel in every checkpoint, and whoever continues from it reports them again; what had arrived is not counted twice.
"""

import collections
import threading
from collections.abc import Mapping
from typing import Any

from orchestrator.ray_support.node_load import NODE

# `ray.train.report` returns when the controller has fetched the report before, which it may not have written down yet.
_MAY_BE_LOST = 2
_NOT_AGAIN = (NODE, "artifacts")  # said of a moment, or lost with the node


class UnconfirmedReports:
    """Rank 0's reports in order, until two later ones were sent; safe for two threads."""

    def __init__(self) -> None:
        self._lines: collections.deque[dict[str, Any]] = collections.deque()
        self._sent = 0
        self._lock = threading.Lock()

    def add(self, line: Mapping[str, Any]) -> None:
        """A report is about to be queued."""
        with self._lock:
            self._lines.append({key: value for key, value in line.items() if key not in _NOT_AGAIN})

    def sent(self) -> None:
        """The oldest report that was not sent is."""
        with self._lock:
            self._sent += 1
            if self._sent > _MAY_BE_LOST:
                self._sent -= 1
                self._lines.popleft()

    def lines(self) -> list[dict[str, Any]]:
        """All that may not have arrived, the oldest first."""
        with self._lock:
            return [dict(line) for line in self._lines]
