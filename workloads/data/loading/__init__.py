"""Loads batches from shards in the order of the sample plan."""
