"""The script of a logged model: MLflow loads `ServedModel`, which turns images into embeddings or detections."""

import warnings
from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.pyfunc import PythonModel

from workloads.serving.predict import Predictor

# The schema is given when the model is logged; MLflow asks for type annotations on `predict` even so.
warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.pyfunc\.utils\.data_validation")


class ServedModel(PythonModel):
    """A logged model; `module` is the network, for use without `predict`, such as embedding crops."""

    module: Any

    def load_context(self, context: Any) -> None:
        """Read the weights."""
        self.predictor = Predictor(Path(context.artifacts["checkpoint"]))
        self.module, self.settings = self.predictor.module, self.predictor.settings

    # Without annotations, because MLflow would read them as the schema of the input.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Images float32 (B, 3, h, w) in [0, 1], or an object array of JPEG bytes, to what `Predictor.predict` gives."""
        images = model_input["images"] if isinstance(model_input, dict) else model_input
        return self.predictor.predict(images)


mlflow.models.set_model(ServedModel())
