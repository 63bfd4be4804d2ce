"""The key-value store on a real cluster, and the credentials that pass through it: gone when the job has ended."""

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.ray_support import credentials, private
from orchestrator.ray_support.private import KeyValueStore

DRIVER = """
    import json, os, sys, time
    import ray
    from orchestrator.ray_support.session import connect
    from orchestrator.ray_support.private import KeyValueStore

    connect(sys.argv[1], {"AWS_SECRET_ACCESS_KEY": "planted", "AWS_REGION": "here"})

    @ray.remote(num_cpus=0)
    def seen():
        return os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_REGION"]

    config = ray._private.worker.global_worker.core_worker.get_job_config().runtime_env_info
    print(json.dumps({
        "seen": ray.get(seen.remote()),
        "keys": KeyValueStore().keys("credentials/"),
        "eager": config.runtime_env_config.eager_install,
        "shown": "planted" in config.serialized_runtime_env,
    }), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that this process has joined."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield str(cluster.address)
    ray.shutdown()
    cluster.shutdown()


def driver(address: str, *, stays_s: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), address, str(stays_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_get_the_secrets_and_the_store_forgets_them_with_their_driver(address: str) -> None:
    killed = driver(address, stays_s=600.0)
    assert killed.stdout is not None
    left = json.loads(killed.stdout.readline())["keys"]
    assert len(left) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert KeyValueStore().keys("credentials/") == left  # nobody was there to delete it: the next driver does

    ended = driver(address, stays_s=0.0)
    out = json.loads(ended.communicate(timeout=120)[0])
    assert ended.returncode == 0
    assert out["seen"] == ["planted", "here"] and not out["shown"]
    assert len(out["keys"]) == 1 and out["keys"] != left
    assert not out["eager"]  # else Ray unpacks the credentials file on nodes where nothing removes it
    assert KeyValueStore().keys("credentials/") == []


def test_a_process_without_its_credentials_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CREDENTIALS", "credentials/gone")
    monkeypatch.setattr(credentials, "_WAIT_S", 0.3)
    with pytest.raises(credentials.CredentialsMissingError, match="did not arrive within"):
        credentials.fetch()


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "actor"])
def test_values_are_shared_with_and_without_the_internal_store(
    address: str, monkeypatch: pytest.MonkeyPatch, internal: bool
) -> None:
    monkeypatch.setattr(private, "has_key_value_store", lambda: internal)
    store = KeyValueStore(f"test-{internal}")
    assert store.get("a/1") is None and not store.exists("a/1") and store.keys("a/") == []
    store.put("a/1", "one")
    store.put("a/1", b"two")
    store.put("b", "three")
    again = KeyValueStore(f"test-{internal}")
    assert again.get("a/1") == b"two" and again.exists("a/1") and again.keys("a/") == ["a/1"]
    again.delete("a/1")
    again.delete("a/1")
    assert store.get("a/1") is None
