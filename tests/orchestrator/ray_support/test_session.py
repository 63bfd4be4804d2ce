"""How a command connects to Ray when Ray is not there, or does not start."""

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import ray

from orchestrator.experiments.spec import ScalingConfig
from orchestrator.ray_support import session
from workloads.errors import ConfigError, RunFailedError


def test_a_cluster_that_is_gone_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_ANSWER_S", 0.1)
    with pytest.raises(ConfigError, match=r"no cluster answers at 127\.0\.0\.1:1 .*unset it"):
        session.connect("127.0.0.1:1", {})


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[dict[str, Any]]]:
    """Makes the next starts of a local Ray fail; returns the options of all that are tried."""

    def fail(times: int) -> list[dict[str, Any]]:
        tried: list[dict[str, Any]] = []

        def init(**options: Any) -> None:
            tried.append({**options, "temporary": os.environ.get("RAY_TMPDIR")})
            if len(tried) <= times:
                raise Exception("The current node timed out during startup. This could happen because …")

        monkeypatch.setattr(ray, "init", init)
        return tried

    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_enable_metrics_collection", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
    return fail


def test_a_local_ray_that_does_not_start_is_tried_once_more(
    starts: Callable[[int], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    tried = starts(1)
    with caplog.at_level(logging.WARNING):
        session.connect(None, {}, cpus=64)
    assert len(tried) == 2 and tried[1]["num_cpus"] == max(64, os.cpu_count() or 1)
    assert "trying once more" in caplog.text


def test_a_local_ray_that_never_starts_ends_in_one_sentence(starts: Callable[[int], list[dict[str, Any]]]) -> None:
    starts(9)
    with pytest.raises(RunFailedError, match=r"did not start in two attempts and \d+ s \(The current node timed out"):
        session.connect("local", {})


def test_a_temporary_folder_too_long_for_sockets_is_passed_over(
    starts: Callable[[int], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = starts(0)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 105)
    session.connect(None, {})
    assert tried[0]["temporary"] == "/tmp"


@pytest.mark.parametrize(
    ("wanted", "address", "preloaded", "holds", "uses"),
    [
        (None, "", "", True, True),  # a local Ray
        (None, "10.0.0.1:6379", "", True, False),  # nodes that somebody else started
        (None, "10.0.0.1:6379", "orchestrator.training.preload", True, True),
        (True, "10.0.0.1:6379", "", True, True),
        (False, "", "", True, False),
        (True, "", "", False, False),  # another Ray
    ],
)
def test_who_uses_fast_paths(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | None, address: str, preloaded: str, holds: bool, uses: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_preload_python_modules", preloaded)
    monkeypatch.setattr(session, "contract_fault", lambda: None if holds else "a name is missing")
    assert session.uses_fast_paths(ScalingConfig(fast_start=wanted)) == uses
