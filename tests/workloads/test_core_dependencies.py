"""`workloads` imports where only the core dependencies are installed, as on a machine that has torch and little else."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.places import ROOT

IMPORT_ALL = '''
import importlib, json, pkgutil, sys
from importlib.machinery import PathFinder

refused = set(json.loads(sys.stdin.read()))

class Without(PathFinder):
    """Finds what is installed, but for the packages that are refused."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import workloads.__main__

early = "torch" in sys.modules
failed = {}
for module in pkgutil.walk_packages(workloads.__path__, "workloads."):
    if module.name.startswith("workloads.examples."):  # scripts for the reader, which begin to work when they are imported
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
print(json.dumps({"early": early, "failed": failed, "imported": [name for name in sys.modules if name.startswith("workloads.")]}))
'''


def core() -> set[str]:
    """The distributions of the core dependencies, and what these require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[str] = set()
    waiting = list(project["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            waiting += requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
    return found


def test_every_module_imports_with_the_core_dependencies_alone():
    allowed = core()
    refused = [
        module
        for module, distributions in packages_distributions().items()
        if not any(canonicalize_name(name) in allowed for name in distributions)
        and module not in ("workloads", "orchestrator", "cluster", "tests")
    ]
    assert {"ray", "mlflow", "typer", "rich", "sklearn", "matplotlib", "timm"} <= set(refused)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], input=json.dumps(refused), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failed"] == {}
    assert not result["early"]  # a wrong command line of `python -m workloads` does not wait for torch
    assert "workloads.loops.pretrain" in result["imported"] and "workloads.__main__" in result["imported"]
