"""Trains one experiment with Ray Train, records it, and continues it after faults."""

PRELOAD = "orchestrator.training.preload"
"""Module that idle processes import on nodes that this project starts (`ray_support.spare_processes.importing`)."""
