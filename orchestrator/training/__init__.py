"""Trains one experiment with Ray Train, records it, and continues it after faults."""
