"""Evaluations of a model on a held-out dataset."""
