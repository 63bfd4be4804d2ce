"""Loops: each reads top-down in the same order."""
