"""The trained model as MLflow keeps it: weights as plain tensors and the code that reads them, nothing pickled.

MLflow's default for torch, a traced graph, is bound to the batch size of its example. This form takes any number of
images of any size, as an array or as an object array of JPEG bytes, and loading it runs no code but `workloads`' own,
which travels with it.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs

MODEL_NAME = "model"
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "torch", "torchvision")


def log_checkpoint(checkpoint: str, filesystem: arrow_fs.FileSystem, *, run_id: str, uri: str, step: int) -> str:
    """Log the networks of the folder `checkpoint` as the LoggedModel of run `run_id`; returns the model's URI."""
    import logging

    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    import workloads

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    images = TensorSpec(np.dtype("float32"), (-1, 3, -1, -1), name="images")
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id, log_system_metrics=False):
        weights = Path(folder, "checkpoint")
        write_weights(checkpoint, filesystem, weights)
        # Recorded, so that nobody sees them: MLflow asks for hints that the schema makes needless, and sets filters aside.
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


def _example() -> Any:
    """Two images of 64 × 64 pixels, a horizontal and a vertical ramp: small, since MLflow keeps them as text."""
    import numpy as np

    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    flat = np.broadcast_to(ramp, (3, 64, 64))
    return np.stack([flat, flat.transpose(0, 2, 1)]).round(3)


def _pinned() -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def write_weights(checkpoint: str, filesystem: arrow_fs.FileSystem, target: Path) -> None:
    """Copy `checkpoint` without the optimiser's state, which is two thirds of it and of no use to a model's reader."""
    from workloads.storage.checkpoint import CONFIG, Snapshot, read_checkpoint, write_checkpoint
    from workloads.storage.filesystems import read_bytes

    found = read_checkpoint(checkpoint, filesystem)
    config = read_bytes(filesystem, f"{checkpoint}/{CONFIG}").decode()
    weights = {"model": found.state["model"], "step": found.state["step"]}
    write_checkpoint(Snapshot(meta=found.meta, config_yaml=config, state=weights), str(target))


def fetch_weights(run_id: str, *, client: Any, folder: Path) -> Path | None:
    """The checkpoint folder of a run's newest LoggedModel, downloaded below `folder`; None if it has no model."""
    import mlflow

    run = client.get_run(run_id)
    found = client.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        max_results=1,
    )
    if not found:
        return None
    mlflow.set_tracking_uri(client.tracking_uri)  # models are looked up there, whatever the call below is told
    # The whole model: an address below `models:/m-…` is taken for a registered model's name and version.
    (folder / "model").mkdir()
    local = mlflow.artifacts.download_artifacts(found[0].model_uri, dst_path=str(folder / "model"))
    return Path(local, "artifacts", "checkpoint")


def fetch_model(uri: str, *, client: Any, folder: Path) -> tuple[str, Path]:
    """The run id and the checkpoint folder of a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        ConfigError: there is no such model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    from workloads.errors import ConfigError

    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
        mlflow.set_tracking_uri(client.tracking_uri)
        (folder / "model").mkdir()
        local = mlflow.artifacts.download_artifacts(f"models:/{name}/{version.version}", dst_path=str(folder / "model"))
    except MlflowException as error:
        raise ConfigError(f"{uri}: no such registered model ({error.message})") from None
    return str(version.run_id), Path(local, "artifacts", "checkpoint")
