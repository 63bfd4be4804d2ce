"""Everything that uses MLflow: delivery of a run's journal, lookup of runs and models, the model registry."""
