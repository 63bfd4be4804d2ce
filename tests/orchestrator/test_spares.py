"""On a real node: an ordered process waits with its imports done, and the actor of its environment is the one that gets it."""

import json
import subprocess
import sys
import textwrap

SCRIPT = """
    import json, os, sys, time
    from orchestrator.spares import WORKER_ENVIRONMENT, importing, order
    os.environ.update(importing())
    import psutil, ray
    from ray.runtime_env import RuntimeEnv

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    class Actor:
        def describe(self):
            modules = [name for name in ("torchvision", "orchestrator.ray_runtime", "ray.train") if name in sys.modules]
            return {"pid": os.getpid(), "modules": modules}

        def order_like_me(self):
            order()

    def idle():
        return {p.pid for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == ["ray::IDLE"]}

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


def test_an_ordered_process_is_taken_by_the_actor_of_its_environment():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unasked"] == []  # Ray would have started one for each CPU
    assert len(found["ordered"]) == 1
    assert found["mine"]["pid"] == found["ordered"][0] != found["other"]["pid"]
    assert found["mine"]["modules"] == ["torchvision", "orchestrator.ray_runtime", "ray.train"]
    assert found["other"]["modules"] == ["ray.train"]  # only workers import what workers need
    assert found["heir"]["pid"] in found["again"]
