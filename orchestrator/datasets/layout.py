"""Names the files and folders of a dataset that is being built: `shard_name`, `part_folder`, `STATE_FOLDER`."""

Reject = tuple[str, str, str]
"""(path in the source, image id, reason)"""

STATE_FOLDER = "_build"
"""Folder below the output that holds the results of finished shards until the manifest is committed."""


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.parquet"


def part_folder(root: str, part: str) -> str:
    """Folder of the part `train` or `val` of a build, or of all of it (part "")."""
    return f"{root}/{part}" if part else root
