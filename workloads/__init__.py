"""The science: data, models, objectives, metrics and loops. Runs wherever torch runs, without Ray and MLflow."""
