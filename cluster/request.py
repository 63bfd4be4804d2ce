"""What a run asks of machines that somebody else runs, for the files that describe them."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRequest:
    """A run and its machines."""

    name: str
    """Of the run; the files' objects are called after it."""
    experiment_yaml: str
    """The whole experiment."""
    command: str = "train"
    """`train` or `sweep`."""
    image: str = "orchestrator:0.1.0"
    """Container image with this package, built from `cluster/Containerfile`."""
    ray_version: str
    fewest_workers: int
    most_workers: int
    cpus_per_worker: int
    memory_gib: int
    """Of each worker."""
    gpus_per_worker: int = 0
    tracking_uri: str | None = None
    """An MLflow server that exists; None: one is described too, where that is possible."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every node; none of them secret."""
    spot: bool = True
    """Workers may be taken away: the run goes on from its checkpoint."""
    retries: int = 3

    @property
    def object_name(self) -> str:
        """The name as Kubernetes and AWS take it: lower case, at most 47 characters, which is what KubeRay leaves free."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:47].rstrip("-")
