"""`ClusterRequest`: a run and the machines it needs, which the renderers turn into files."""

import re
from dataclasses import dataclass, field

from cluster.errors import ClusterRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRequest:
    """A run and its machines.

    Raises:
        ClusterRequestError: a value cannot be passed on safely, because a tool that reads the file would take it as shell text.
    """

    name: str
    """Name of the run, from which the names of the files' objects are made."""
    experiment_yaml: str
    """The complete experiment file."""
    command: str = "train"
    """Subcommand of `orchestrator`: train, finetune or sweep."""
    image: str = "orchestrator:0.1.0"
    """Container image with this package, built from `cluster/files/Containerfile`."""
    ray_version: str
    fewest_workers: int
    most_workers: int
    cpus_per_worker: int
    memory_gib: int
    """Memory of each worker, GiB."""
    gpus_per_worker: int = 0
    tracking_uri: str | None = None
    """Address of an existing MLflow server; None: the files describe one, where the target allows it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every node; none of them secret."""
    spot: bool = True
    """Use workers that the provider may take away; the run continues from its checkpoint."""
    retries: int = 3
    """How often KubeRay starts the job again on a new cluster."""

    def __post_init__(self) -> None:
        # `ray up` puts the image's name into shell commands as it is.
        require("--image", self.image, r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
        require("the command", self.command, r"[a-z-]+")
        for name in self.environment:
            require("the name of a variable", name, r"[A-Za-z_][A-Za-z0-9_]*")

    @property
    def object_name(self) -> str:
        """The run's name as Kubernetes and AWS take it: letters, digits and dashes, at most 47 characters (KubeRay's limit)."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return (name if name[:1].isalpha() else f"run-{name}")[:47].strip("-")


def require(what: str, value: str, pattern: str) -> None:
    """Check that the whole `value` matches `pattern`.

    Raises:
        ClusterRequestError: it does not.
    """
    if not re.fullmatch(pattern, value):
        raise ClusterRequestError(f"{what} {value!r}: expected letters, digits and ._/:@- only")
