"""What MLflow runs to load and call a logged model: images in, embeddings or detections out."""

import warnings
from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.pyfunc import PythonModel

from workloads.serving.predict import Predictor

# The schema is given when the model is logged; MLflow asks for annotations on `predict` all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.pyfunc\.utils\.data_validation")


class ServedModel(PythonModel):
    """A run's model; `module` is the network itself, for whoever wants crops embedded."""

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
