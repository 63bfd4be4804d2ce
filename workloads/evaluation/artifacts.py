"""Writes the artifacts of an evaluation: `artifact_folder` for the folder, `write_report` for a figures file and a table."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workloads.parallel.runtime import new_folder


@contextlib.contextmanager
def artifact_folder() -> Iterator[Path]:
    """A fresh local folder for artifacts, removed again if the block raises; afterwards it is the runtime's (see `report`)."""
    folder = new_folder()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_report(
    folder: Path,
    name: str,
    step: int,
    record: Mapping[str, Any] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `record` as `report/NAME_step_STEP.json` and `columns` as `report/NAME_step_STEP.npz` to `folder`."""
    file = folder / "report" / f"{name}_step_{step:07d}"
    file.parent.mkdir(exist_ok=True)
    if record is not None:
        file.with_suffix(".json").write_text(json.dumps({"step": step, **record}, indent=2), encoding="utf-8")
    if columns is not None:
        np.savez_compressed(file.with_suffix(".npz"), **columns)  # type: ignore[arg-type]
