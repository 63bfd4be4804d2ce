"""Reads the CPU, memory and GPU-memory load of each worker's node (`NodeLoad`), which is attached to its reports.

MLflow's system metrics cover the driver's machine only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

NODE = "node"
"""Key of the node's load in a worker's report."""


class NodeLoad:
    """The load of this worker's node; each reading covers the time since the one before."""

    def __init__(self, address: str) -> None:
        import psutil

        self._address = address
        psutil.cpu_percent()  # the first call starts the interval

    def read(self) -> dict[str, Any]:
        """`address`, and percentages: of the node's CPU time, memory, and, on a GPU, this worker's GPU's memory."""
        import psutil
        import torch

        load = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            load["gpu_memory_percent"] = 100 * (1 - free / total)
        return {"address": self._address, **load}


def by_node(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`node/<address>/<load>` → percentage from all workers' reports; of a node with several workers the largest."""
    largest: dict[str, float] = {}
    for report in reports:
        load = dict(report.get(NODE) or {})
        address = load.pop("address", None)
        for name, value in load.items():
            key = f"node/{address}/{name}"
            largest[key] = max(float(value), largest.get(key, 0.0))
    return largest
