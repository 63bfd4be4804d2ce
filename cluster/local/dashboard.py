"""Asks the dashboard of a local cluster for its nodes and resources, and whether it takes jobs.

Over HTTP, because this package does not import Ray: `/api/v0/nodes` is what `ray.util.state.list_nodes` requests.
"""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from cluster.local.state import LocalCluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A live Ray node."""

    id: str
    address: str
    resources: dict[str, float]


def live_nodes(cluster: LocalCluster) -> list[Node]:
    """Ray's nodes that are alive.

    Raises:
        OSError, ValueError, KeyError: the dashboard does not answer, or answers something else.
    """
    answer = _get(
        cluster, "/api/v0/nodes?limit=1000&timeout=5&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    )
    return [
        Node(id=node["node_id"], address=node["node_ip"], resources=node["resources_total"])
        for node in answer["data"]["result"]["result"]
    ]


def resources(cluster: LocalCluster) -> dict[str, float]:
    """Ray's resources, summed over all nodes."""
    total: dict[str, float] = {}
    for node in live_nodes(cluster):
        for name, amount in node.resources.items():
            if not name.startswith("node:"):
                total[name] = total.get(name, 0.0) + amount
    return total


def takes_jobs(cluster: LocalCluster) -> bool:
    """Whether the job API answers, for which the head's agent must run."""
    return _get(cluster, "/api/jobs/") is not None


def _get(cluster: LocalCluster, path: str) -> Any:
    token = cluster.token_file.read_text(encoding="utf-8").strip()
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)
