"""Free space of a local storage folder, and the size of a checkpoint: `free_bytes`, `checkpoint_bytes`, `is_full`."""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from torch import Tensor, nn

_FULL = re.compile(r"No space left on device|[Dd]isk quota exceeded")


def free_bytes(filesystem: pafs.FileSystem, folder: str) -> int | None:
    """Bytes free for `folder`, which need not exist yet; None where that is not known: object stores, some network disks."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return None
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return None
    return usage.free if usage.total else None


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in a checkpoint, known before the first step: what the optimiser will hold is counted too.

    That is two moments a parameter for Adam's family, one for SGD and LARS with momentum; none for an unknown optimiser.
    """
    state = num_bytes(optimizer.state_dict()["state"])
    if not state:
        for group in optimizer.param_groups:
            moments = 2 if "betas" in group else int(bool(group.get("momentum")))
            state += moments * sum(num_bytes(parameter) for parameter in group["params"])
    return num_bytes(model.state_dict()) + state


def num_bytes(value: Any) -> int:
    """Bytes of all tensors within nested mappings and sequences."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def is_full(error: BaseException) -> bool:
    """Whether `error` says that a disk is full, or a quota is used up."""
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or _FULL.search(str(error)) is not None


def mebibytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:,.1f} MiB"
