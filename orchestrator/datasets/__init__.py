"""Builds, verifies and describes datasets of Parquet shards."""
