"""Logs a checkpoint as an MLflow model (`log_checkpoint`), and downloads it again (`fetch_weights`, `fetch_model`).

The model consists of the weights as plain tensors and a copy of the package `workloads`, the only code that runs when it is
loaded; nothing is pickled. It accepts any number of images of any size, as an array or an object array of JPEG bytes.
MLflow's default for torch, a traced graph, would be bound to the batch size of its example.
"""

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.fs as arrow_fs

from orchestrator.tracking.client import global_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MODEL_NAME = "model"
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "torch", "torchvision")


def log_checkpoint(checkpoint: str, filesystem: arrow_fs.FileSystem, *, run_id: str, uri: str, step: int) -> str:
    """Log the networks of the checkpoint folder `checkpoint` as a LoggedModel of the run; returns the model's URI."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    import workloads

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    images = TensorSpec(np.dtype("float32"), (-1, 3, -1, -1), name="images")
    with (
        tempfile.TemporaryDirectory() as folder,
        global_tracking_uri(uri),
        mlflow.start_run(run_id=run_id, log_system_metrics=False),
    ):
        weights = Path(folder, "checkpoint")
        write_weights(checkpoint, filesystem, weights)
        # MLflow asks for type hints although the signature is given, and overrides warning filters: record to discard.
        with warnings.catch_warnings(record=True):
            info = mlflow.pyfunc.log_model(
                name=MODEL_NAME,
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={"checkpoint": str(weights)},
                code_paths=[str(Path(str(workloads.__file__)).parent)],
                signature=ModelSignature(inputs=Schema([images])),
                input_example=_example(),
                pip_requirements=_pinned(),
                step=step,
            )
    return str(info.model_uri)


def _example() -> np.ndarray:
    """Two images of 64 × 64 pixels, a horizontal and a vertical ramp; small, because MLflow stores them as text."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    flat = np.broadcast_to(ramp, (3, 64, 64))
    return np.stack([flat, flat.transpose(0, 2, 1)]).round(3)


def _pinned() -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def write_weights(checkpoint: str, filesystem: arrow_fs.FileSystem, target: Path) -> None:
    """Copy `checkpoint` to the local folder `target` without the optimiser's state, which is two thirds of it."""
    from workloads.storage.checkpoint import CONFIG, Snapshot, read_checkpoint, write_checkpoint
    from workloads.storage.filesystems import read_bytes

    restored = read_checkpoint(checkpoint, filesystem)
    config = read_bytes(filesystem, f"{checkpoint}/{CONFIG}").decode()
    weights = {"model": restored.state["model"], "step": restored.state["step"]}
    write_checkpoint(Snapshot(meta=restored.meta, config_yaml=config, state=weights), str(target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The networks of a run, downloaded from a LoggedModel."""

    model_id: str
    step: int
    checkpoint: Path  # folder


def fetch_weights(run_id: str, *, client: "MlflowClient", folder: Path) -> Weights | None:
    """Download the run's newest LoggedModel below `folder`; None if there is no model.

    A model whose checkpoint is damaged is skipped with a warning, and the one before it is taken.

    Raises:
        RunFailedError: the checkpoints of all models are damaged.
    """
    from workloads.errors import RunFailedError
    from workloads.storage.checkpoint import CheckpointError, read_checkpoint

    run = client.get_run(run_id)
    models = client.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
    )
    faults = []
    for model in models:
        # The whole model: MLflow takes a path below `models:/m-…` for a registered model's name and version.
        checkpoint = _download(model.model_uri, client, folder / model.model_id)
        try:
            step = read_checkpoint(str(checkpoint)).meta.step
        except CheckpointError as error:
            faults.append(f"{model.model_id}: {str(error).replace(str(checkpoint), 'its checkpoint')}")
            continue
        if faults:
            logger.warning(
                "run %s: using the model of step %d, because newer ones are damaged (%s)",
                run.info.run_name,
                step,
                "; ".join(faults),
            )
        return Weights(model_id=model.model_id, step=step, checkpoint=checkpoint)
    if faults:
        raise RunFailedError(
            f"run {run.info.run_name}: no model of it in MLflow is complete ({'; '.join(faults)}); restore its artifacts"
        )
    return None


def fetch_model(uri: str, *, client: "MlflowClient", folder: Path) -> tuple[str, Path]:
    """Download a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`; returns its run's id and checkpoint folder.

    Raises:
        ConfigError: there is no such model.
    """
    from mlflow.exceptions import MlflowException

    from workloads.errors import ConfigError

    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
        checkpoint = _download(f"models:/{name}/{version.version}", client, folder)
    except MlflowException as error:
        raise ConfigError(f"{uri}: no such registered model ({error.message})") from None
    return str(version.run_id), checkpoint


def _download(model_uri: str, client: "MlflowClient", folder: Path) -> Path:
    import mlflow

    target = folder / "model"
    target.mkdir(parents=True)
    # `download_artifacts` has a parameter `tracking_uri`, which it does not pass on for models.
    with global_tracking_uri(client.tracking_uri):
        local = mlflow.artifacts.download_artifacts(model_uri, dst_path=str(target))
    return Path(local, "artifacts", "checkpoint")
