"""`orchestrator export`: the trunk of a run, or of a registered model, as files that need nothing of this project."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.results.evaluate import EvaluationError
from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.model import fetch_model, fetch_weights
from workloads.errors import ConfigError
from workloads.serving.export import FORMATS, Format, export_checkpoint


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
        ConfigError: no such run, model or format.
        EvaluationError: the run has no model yet.
        ExportError: a written file does not give what the trunk gives.
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
            fetched = fetch_weights(run.info.run_id, client=client, folder=Path(folder))
            if fetched is None:
                raise EvaluationError(f"run {target} has no model yet; let its training end")
            checkpoint = fetched
        return export_checkpoint(
            checkpoint,
            chosen,
            output,
            title=run.info.run_name,
            source=_source(run, target),
            metrics=run.data.metrics,
            licence=licence,
        )


def _source(run: Any, target: str) -> dict[str, str]:
    """Where the model is from, in the words of the run's record."""
    tags = run.data.tags
    datasets = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
    told = {
        "run": f"{run.info.run_name} {run.info.run_id}",
        "registered model": target if target.startswith("models:/") else "",
        "code commit": tags.get("mlflow.source.git.commit", ""),
        "datasets": ", ".join(sorted(datasets)),
    }
    return {what: value for what, value in told.items() if value}
