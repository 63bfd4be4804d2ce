"""Processes that die, hang, come and go."""

import json
import signal
import time
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from tests.chaos.conftest import (
    STEPS,
    Nodes,
    assert_nothing_left,
    assert_nothing_lost,
    driver_of,
    journals,
    newest_step,
    status,
    train_workers,
    wait_step,
    wait_until,
)
from workloads.storage.checkpoint_store import CheckpointStore

Reference = dict[int, dict[int, float]]


@pytest.mark.short
def test_1_a_worker_is_killed_mid_step(nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference) -> None:
    driver = driver_of(tmp_path, images, nodes).start()
    wait_step(driver, 6)
    train_workers()[0].kill()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert status(tmp_path)[1]["fault/worker"] == 1 and "worker process died" in status(tmp_path)[2]["run.faults"]
    assert_nothing_left(nodes)


def test_1_a_worker_is_killed_and_the_run_goes_on_by_public_interfaces_alone(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes, "scaling.fast_start=false").start()
    wait_step(driver, 6)
    train_workers()[0].kill()
    assert driver.wait() == 0, driver.text
    assert "worker fault: a worker process died" in driver.text  # the driver itself judged and continued
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert status(tmp_path)[1]["fault/worker"] == 1 and "worker process died" in status(tmp_path)[2]["run.faults"]
    assert_nothing_left(nodes)


def test_1_on_one_worker_the_losses_are_bit_equal(images: str, tmp_path: Path, undisturbed: Reference) -> None:
    driver = driver_of(tmp_path, images, None, "scaling.num_workers=1").start()
    wait_step(driver, 6)
    train_workers()[0].kill()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[1], bit_equal=True)
    assert_nothing_left(None)


def test_2_a_node_dies_and_another_takes_its_place(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes, "scaling.placement=STRICT_SPREAD").start()
    wait_step(driver, 6)
    nodes.kill_other()
    nodes.join()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


def test_2_an_elastic_run_shrinks_when_a_node_dies(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    elastic = ["scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=2", "scaling.start_timeout_s=10"]
    driver = driver_of(tmp_path, images, nodes, *elastic, "scaling.threads_per_worker=1").start()
    wait_step(driver, 6)
    nodes.kill_other()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


@pytest.mark.short
def test_3_the_driver_is_killed_and_the_command_typed_again(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes).start()
    wait_step(driver, 6)
    driver.kill()
    assert driver.start().wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


def test_4_the_head_dies_and_the_command_is_typed_on_a_new_cluster(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    driver = driver_of(tmp_path, images, nodes).start()
    wait_step(driver, 6)
    nodes.kill_head()
    assert driver.wait(240) != 0
    nodes.close()
    fresh = Nodes()
    try:
        driver.nodes = fresh
        assert driver.start().wait() == 0, driver.text
        assert_nothing_lost(tmp_path, images, undisturbed[2])
        assert_nothing_left(fresh)
    finally:
        fresh.close()


def test_5_sigterm_takes_a_checkpoint_first(nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference) -> None:
    driver = driver_of(tmp_path, images, nodes, "checkpoint_every=1000").start()
    wait_step(driver, 5)
    assert driver.process is not None
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 1
    assert "stopped on request after step" in driver.text and "same command again" in driver.text
    store = CheckpointStore(LocalFileSystem(), f"{tmp_path}/runs/hurt/checkpoints")
    assert store.steps() == [newest_step(tmp_path)]
    assert status(tmp_path)[0] == "FAILED"
    assert driver.start().wait() == 0, driver.text
    assert status(tmp_path)[0] == "FINISHED"
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


def test_5_sigterm_ends_a_run_whose_worker_hangs_within_the_grace_period(images: str, tmp_path: Path) -> None:
    driver = driver_of(tmp_path, images, None, "scaling.num_workers=1", "failure.grace_s=6").start()
    wait_step(driver, 6)
    hung = train_workers()[0]
    hung.suspend()
    assert driver.process is not None
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 1
    assert "failure.grace_s" in driver.text and "same command again" in driver.text
    hung.kill()
    assert driver.start("failure.grace_s=30").wait() == 0, driver.text
    assert status(tmp_path)[0] == "FINISHED"


def test_5_notice_that_a_node_will_be_taken_brings_a_checkpoint(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    given = ["scaling.placement=STRICT_SPREAD", "checkpoint_every=1000", "steps=400"]
    driver = driver_of(tmp_path, images, nodes, *given).start()
    wait_step(driver, 5)
    nodes.drain_other(deadline_s=10)
    store = CheckpointStore(LocalFileSystem(), f"{tmp_path}/runs/hurt/checkpoints")
    wait_until(lambda: bool(store.steps()), "a checkpoint", driver, timeout_s=10)
    saved = store.steps()[0]
    nodes.join()
    wait_until(lambda: "fault" in journals(tmp_path)[0].read_text(), "the node's end", driver)
    begun = newest_step(tmp_path)
    wait_step(driver, begun + 3)
    assert driver.process is not None
    driver.process.send_signal(signal.SIGTERM)
    driver.wait(60)
    faults = [json.loads(line) for line in journals(tmp_path)[0].read_text().splitlines() if '"fault"' in line]
    assert faults[0]["failure"]["saved_step"] >= saved
    assert_nothing_left(nodes)


def test_6_a_node_joins_and_an_elastic_run_grows(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    elastic = ["scaling.num_workers=[1, 3]", "scaling.cpus_per_worker=2", "scaling.resize_check_s=1"]
    driver = driver_of(tmp_path, images, nodes, *elastic, "scaling.threads_per_worker=1", "steps=150").start()
    wait_step(driver, 5)
    nodes.join()
    wait_until(lambda: len(train_workers()) == 3, "three workers", driver)
    assert driver.wait() == 0, driver.text
    assert_nothing_left(nodes)


def test_13_a_worker_that_hangs_is_replaced(nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference) -> None:
    driver = driver_of(tmp_path, images, nodes, "scaling.hang_timeout_s=8").start()
    wait_step(driver, 6)
    train_workers()[0].suspend()
    assert driver.wait() == 0, driver.text
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)


@pytest.mark.short
def test_14_of_two_drivers_of_one_run_one_is_refused(
    nodes: Nodes, images: str, tmp_path: Path, undisturbed: Reference
) -> None:
    first = driver_of(tmp_path, images, nodes).start()
    second = driver_of(tmp_path, images, nodes)
    second.folder = tmp_path / "second"
    second.folder.mkdir()
    time.sleep(1.0)
    second.start()
    ends = [first.wait(), second.wait()]
    assert sorted(ends) == [0, 2], first.text + second.text
    assert "another process is training run 'hurt'" in first.text + second.text
    assert newest_step(tmp_path) == STEPS
    assert_nothing_lost(tmp_path, images, undisturbed[2])
    assert_nothing_left(nodes)
