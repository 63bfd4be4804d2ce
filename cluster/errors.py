"""The errors of this package: `ClusterError` and `ClusterRequestError`, each with the exit code of the command that ends with it.

They are not those of `workloads.errors`, which this package does not import.
"""


class ClusterError(RuntimeError):
    """A cluster cannot be started, reached or stopped; the message is one sentence with the reason and the fix."""

    exit_code = 1
    """Exit code of the command."""


class ClusterRequestError(ClusterError):
    """The options cannot work; nothing was started or written."""

    exit_code = 2
