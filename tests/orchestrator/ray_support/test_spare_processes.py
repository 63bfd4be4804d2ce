"""On a real node: an ordered process waits with its imports done, and the actor of its environment is the one that gets it."""

import json
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import contextlib, json, os, sys, time
    from orchestrator.ray_support.spare_processes import WORKER_ENVIRONMENT, importing, order
    from orchestrator.training import PRELOAD
    os.environ.update(importing(PRELOAD))
    import psutil, ray
    from ray.runtime_env import RuntimeEnv

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    class Actor:
        def describe(self):
            modules = [name for name in ("torchvision", "orchestrator.training.worker", "ray.train") if name in sys.modules]
            return {"pid": os.getpid(), "modules": modules}

        def order_like_me(self):
            order()

    def idle():
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                if process.cmdline()[:1] == ["ray::IDLE"]:
                    found.add(process.pid)
        return found

    def actor(environment):
        return ray.remote(num_cpus=0, runtime_env=environment)(Actor).remote()

    def wait(count):
        deadline = time.monotonic() + 90
        while len(idle()) < count and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1.0)
        return idle()

    unasked = wait(0)
    order(environment=RuntimeEnv(**WORKER_ENVIRONMENT).serialize())
    ordered = wait(1)
    other = actor({"env_vars": {"SOMETHING": "else"}})
    its = ray.get(other.describe.remote())
    worker = actor(WORKER_ENVIRONMENT)
    mine = ray.get(worker.describe.remote())
    ray.get(worker.order_like_me.remote())
    again = wait(1)
    heir = ray.get(actor(WORKER_ENVIRONMENT).describe.remote())
    print(json.dumps({"unasked": sorted(unasked), "ordered": sorted(ordered), "other": its, "mine": mine,
                      "again": sorted(again), "heir": heir}))
"""


@pytest.mark.chaos
@pytest.mark.short
def test_an_ordered_process_is_taken_by_the_actor_of_its_environment():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unasked"] == []  # Ray would have started one for each CPU
    assert len(found["ordered"]) == 1
    assert found["mine"]["pid"] == found["ordered"][0] != found["other"]["pid"]
    assert found["mine"]["modules"] == ["torchvision", "orchestrator.training.worker", "ray.train"]
    assert found["other"]["modules"] == ["ray.train"]  # only workers import what workers need
    assert found["heir"]["pid"] in found["again"]


TRAINING = """
    import contextlib, json, os, pathlib, tempfile, time
    from orchestrator.ray_support.spare_processes import WORKER_ENVIRONMENT, importing, order_first
    from orchestrator.training import PRELOAD
    os.environ.update(importing(PRELOAD) | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"})  # Ray Train passes such variables on
    import psutil, ray, ray.train
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    def idle():
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                if process.cmdline()[:1] == ["ray::IDLE"]:
                    found.add(process.pid)
        return found

    order_first(2)
    deadline = time.monotonic() + 90
    while len(idle()) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    ordered = idle()

    def worker(place):
        pathlib.Path(place, f"pid-{ray.train.get_context().get_world_rank()}").write_text(str(os.getpid()))

    with tempfile.TemporaryDirectory() as storage:
        TorchTrainer(
            worker,
            train_loop_config=storage,
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(storage_path=storage, worker_runtime_env=WORKER_ENVIRONMENT),
        ).fit()
        workers = sorted(int(path.read_text()) for path in pathlib.Path(storage).glob("pid-*"))
    print(json.dumps({"ordered": sorted(ordered), "workers": workers, "left": sorted(idle() & ordered)}))
"""


def test_what_a_run_orders_first_is_what_its_processes_take():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ordered"]) == 4  # the controller, what workers wait by, two workers
    assert len(found["workers"]) == 2
    assert set(found["workers"]) < set(found["ordered"])
    assert found["left"] == []
