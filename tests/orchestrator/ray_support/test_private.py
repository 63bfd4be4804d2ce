"""The contract with Ray's private interfaces: names and signatures of the installed release, checked without a cluster."""

import ast
from pathlib import Path

import pytest

from orchestrator.ray_support import private
from orchestrator.ray_support.private import FAST_PATHS, JOB_CLIENT, KEY_VALUE_STORE, PrivateName

ROOT = Path(__file__).parents[3]
PRIVATE = ("ray._private", "ray._raylet", "ray.core.generated", "ray.experimental.internal_kv")


@pytest.mark.parametrize(
    "name", FAST_PATHS + KEY_VALUE_STORE + JOB_CLIENT, ids=lambda name: f"{name.module}.{name.name}"
)
def test_ray_has(name: PrivateName) -> None:
    assert name.fault() is None


def test_a_name_that_is_gone_or_takes_other_arguments_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution import failure_handling, scaling_policy

    assert private.faults() == []
    monkeypatch.delattr(failure_handling, "FailurePolicy")
    monkeypatch.setattr(scaling_policy.ElasticScalingPolicy, "_get_reserved_resources", lambda self, nodes: None)
    module = "ray.train.v2._internal.execution"
    assert f"{module}.failure_handling.FailurePolicy is missing" in private.faults()
    assert (
        f"{module}.scaling_policy.ElasticScalingPolicy._get_reserved_resources takes (self, nodes), not (self)"
        in private.faults()
    )


def test_a_release_that_was_not_tested_gets_the_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    private.contract_fault.cache_clear()
    assert private.fast_paths_hold()
    private.contract_fault.cache_clear()
    monkeypatch.setattr(ray, "__version__", "2.99.0")
    assert not private.fast_paths_hold()
    assert private.contract_fault() == f"Ray 2.99.0 is installed, they were tested with {private.CHECKED_WITH}"
    private.contract_fault.cache_clear()


# import-linter knows an external package as a whole only, so this contract is a test.
@pytest.mark.parametrize("package", ["orchestrator", "cluster", "workloads"])
def test_private_modules_of_ray_are_imported_by_one_module_only(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found += [str(path.relative_to(ROOT)) for name in names if name.startswith(PRIVATE) or "._internal" in name]
    assert set(found) <= {"orchestrator/ray_support/private.py"}
