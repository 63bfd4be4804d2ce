"""The types of MLflow that annotations in other packages use: `MlflowClient`, `ModelVersion`, `Run`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import Run as Run
    from mlflow.entities.model_registry import ModelVersion as ModelVersion
