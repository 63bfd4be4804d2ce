"""How busy each node of a run is, told by the workers with their reports: MLflow's own system metrics know only the driver's machine."""

from collections.abc import Mapping, Sequence
from typing import Any

NODE = "node"
"""Key of a worker's report under which its node's load is."""


class NodeLoad:
    """The load of this worker's node; each reading covers the time since the one before."""

    def __init__(self, address: str) -> None:
        import psutil

        self._address = address
        psutil.cpu_percent()  # the first reading has no beginning

    def read(self) -> dict[str, Any]:
        """`address`, and percentages: of the node's CPU time, memory, and, on a GPU, this worker's GPU's memory."""
        import psutil
        import torch

        found = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["gpu_memory_percent"] = 100 * (1 - free / total)
        return {"address": self._address, **found}


def by_node(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`node/<address>/<what>` → percentage, from all workers' reports; the busiest worker of a node speaks for it."""
    found: dict[str, float] = {}
    for report in reports:
        load = dict(report.get(NODE) or {})
        address = load.pop("address", None)
        for what, value in load.items():
            key = f"node/{address}/{what}"
            found[key] = max(float(value), found.get(key, 0.0))
    return found
