"""Exports trunks, and predicts with a finished model."""
