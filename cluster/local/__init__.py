"""Starts and stops a Ray cluster on this machine: raylets, an MLflow server and optionally an S3 store, all on loopback.

`up` and `down` are in `lifecycle`. Every raylet has its own loopback address (127.0.0.2, 127.0.0.3, …): Ray identifies nodes by
address, so two raylets on one address would share node and local ranks and overwrite each other's unpacked job files.
"""

from cluster.errors import ClusterError
from cluster.local.dashboard import live_nodes, resources
from cluster.local.lifecycle import down, up
from cluster.local.processes import processes
from cluster.local.state import BUCKET, MARK, LocalCluster, LocalOptions, default_folder, find
from cluster.local.supervisor import ProgramState, states

__all__ = [
    "BUCKET",
    "MARK",
    "ClusterError",
    "LocalCluster",
    "LocalOptions",
    "ProgramState",
    "default_folder",
    "down",
    "find",
    "live_nodes",
    "processes",
    "resources",
    "states",
    "up",
]
