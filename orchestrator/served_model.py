"""What MLflow runs to load and call a logged model: images in, pyramid embeddings out."""

import warnings
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from workloads.spec import load_model

# The schema is given when the model is logged; MLflow asks for annotations on `predict` all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.pyfunc\.utils\.data_validation")


class PyramidModel(PythonModel):
    """Embeds every grid cell of full images; `module` is the network itself, for whoever wants crops embedded."""

    module: Any

    def load_context(self, context: Any) -> None:
        """Read the weights."""
        self.module, self.settings = load_model(Path(context.artifacts["checkpoint"]))

    # Without annotations, because MLflow would read them as the schema of the input.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Images float32 (B, 3, h, w) in [0, 1] → level name → float32 (B, C, h / stride, w / stride)."""
        images = model_input["images"] if isinstance(model_input, dict) else model_input
        with torch.inference_mode():
            pyramid = self.module.embed_grid(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
        return {level: cells.float().numpy() for level, cells in pyramid.items()}


mlflow.models.set_model(PyramidModel())
