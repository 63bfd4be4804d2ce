"""`LocalRuntime`: SIGTERM during its life and after it, and the current device under torchrun."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from workloads.errors import RunStoppedError
from workloads.parallel.runtime import LocalRuntime


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.001)  # Python runs the handler before it goes on


def test_sigterm_is_a_request_and_goes_back_to_its_handler_on_close(tmp_path: Path):
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with LocalRuntime(tmp_path) as runtime:
            assert runtime.request() == "go on"
            terminate_self()
            assert runtime.request() == "stop" and received == []
        terminate_self()
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_work_without_checkpoints_at_once(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError, match="stopped on request"), LocalRuntime(tmp_path, interruptible=True):
        terminate_self()
        time.sleep(30)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_current_device_is_that_of_the_local_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With two pretended GPUs: NCCL, and every "cuda" without an index, would use the first one in both processes."""
    chosen: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with LocalRuntime(tmp_path) as runtime:
        assert chosen == [runtime.device] == [torch.device("cuda", 1)]
