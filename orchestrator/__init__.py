"""Runs the science of `workloads` on Ray and keeps its record in MLflow."""
