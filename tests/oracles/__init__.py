"""Slow and obvious restatements of losses, metrics and plans, with which tests compare."""
