"""Names of the files and folders of a dataset that is being built."""

Reject = tuple[str, str, str]
"""(path in the source, image id, reason)"""

STATE_FOLDER = "_build"


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.parquet"


def part_folder(root: str, part: str) -> str:
    return f"{root}/{part}" if part else root
