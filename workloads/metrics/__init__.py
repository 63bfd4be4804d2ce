"""Metrics: grid accuracy, representation, one-shot detection and retrieval, average precision, CorLoc, and bootstrap intervals."""
