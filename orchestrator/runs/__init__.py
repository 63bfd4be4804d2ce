"""A run's identity, lock and journal, without Ray or MLflow."""
