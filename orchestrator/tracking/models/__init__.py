"""Models in MLflow: logging a checkpoint as a LoggedModel, the code that serves it, and the model registry."""
