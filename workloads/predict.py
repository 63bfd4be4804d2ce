"""Keeps `Predictor` importable by its former name: models logged by release 0.1 import it as `workloads.predict`."""

from workloads.serving.predict import Predictor

__all__ = ["Predictor"]
