"""A run's name, lock and journal; knows neither Ray nor MLflow."""
