"""Imported by Ray in every idle worker process (`RAY_preload_python_modules`), so that heavy imports are done before work arrives.

Imports cost seconds of a core, so the actor by which workers wait for each other must not import what only workers use.
"""

import importlib
import os

from orchestrator.ray_support.spare_processes import ROLE, WORKER

_IMPORTED = {WORKER: ("orchestrator.training.worker", "workloads.loops.dispatch")}

for _module in _IMPORTED.get(os.environ.get(ROLE, ""), ("ray.train",)):
    importlib.import_module(_module)
