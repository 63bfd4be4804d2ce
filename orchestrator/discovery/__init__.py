"""Discovers objects in a dataset without labels, on Ray Data's actors."""
