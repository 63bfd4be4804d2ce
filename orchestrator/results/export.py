"""Exports the trunk of a run or of a registered model (`export_run`) to files that need nothing of this project."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.results.evaluate import weights_of
from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.models.logged_model import fetch_model
from workloads.errors import ConfigError
from workloads.serving.export import FORMATS, Format, export_checkpoint

if TYPE_CHECKING:
    from orchestrator.tracking.types import Run


def export_run(
    target: str,
    formats: Sequence[str] = (),
    *,
    output: Path,
    licence: str | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Path]:
    """Write the trunk of `target` in `formats` (default: all) and its model card into `output`; returns purpose → file.

    Args:
        target: MLflow run id or run name, or `models:/NAME/VERSION`, `models:/NAME@ALIAS`.

    Raises:
        ConfigError: no such run, model or format, or the run has no model.
        ExportError: a file that was written does not reproduce the outputs of the trunk.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"--format {unknown[0]}: expected one of {', '.join(FORMATS)}")
    chosen: tuple[Format, ...] = tuple(name for name in FORMATS if not formats or name in formats)
    client = open_tracking(tracking_uri)
    with tempfile.TemporaryDirectory() as folder:
        if target.startswith("models:/"):
            run_id, checkpoint = fetch_model(target, client=client, folder=Path(folder))
            run = client.get_run(run_id)
        else:
            run = find_run(client, target)
            checkpoint = weights_of(client, run, Path(folder)).checkpoint
        return export_checkpoint(
            checkpoint,
            chosen,
            output,
            title=run.info.run_name,
            source=_source(run, target),
            metrics=run.data.metrics,
            licence=licence,
        )


def _source(run: "Run", target: str) -> dict[str, str]:
    """Origin of the model, for its card."""
    tags = run.data.tags
    datasets = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
    source = {
        "run": f"{run.info.run_name} {run.info.run_id}",
        "registered model": target if target.startswith("models:/") else "",
        "code commit": tags.get("mlflow.source.git.commit", ""),
        "datasets": ", ".join(sorted(datasets)),
    }
    return {what: value for what, value in source.items() if value}
