"""Turns sources of images into rows and shards."""
