"""The model registry: `version_at` finds the version behind an alias, `register_model` creates a version with its tags."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.tracking.client import global_tracking_uri
from workloads.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def version_at(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version of the registered model `name` that `alias` points to, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


def register_model(client: "MlflowClient", name: str, *, model_id: str, run_id: str, tags: Mapping[str, object]) -> str:
    """The number of the version of the logged model `model_id`, created now unless it exists; `tags` are set either way.

    Raises:
        ConfigError: `name` cannot be the name of a model.
    """
    from mlflow.exceptions import MlflowException

    with global_tracking_uri(client.tracking_uri):
        if not client.search_registered_models(f"name = '{name}'"):
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                raise ConfigError(f"--model {name}: {error.message}") from None
        existing = [v for v in client.search_model_versions(f"name = '{name}'") if v.model_id == model_id]
        version = (
            existing[0]
            if existing
            else client.create_model_version(name, f"models:/{model_id}", run_id=run_id, model_id=model_id)
        )
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, str(value))
    return str(version.version)
