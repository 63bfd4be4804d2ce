"""Runs a function on W real gloo processes (`run_on_ranks`) and returns every rank's result."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEVICE_ONLY = "cuda:gloo"
"""A backend that refuses tensors on the host, as NCCL does; what a program sends of them must have a group of its own."""


def _enter(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, world_size, *arguments), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run_on_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any, backend: str = "gloo"
) -> list[Any]:
    """Run `function(rank, world_size, *arguments)` on every rank and return its results: tensors, numbers, containers of them.

    Args:
        backend: of the default process group; `DEVICE_ONLY` refuses tensors on the host.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    # The server imports once what every rank of every test would; ranks are forks of it.
    multiprocessing.set_forkserver_preload(["workloads.loops.pretrain", "workloads.loops.finetune"])
    entered = (world_size, port, str(folder), backend, function, arguments)
    mp.start_processes(_enter, entered, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
