"""Slow, obvious restatements that tests compare with."""
