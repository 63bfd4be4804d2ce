"""Filesystems and checkpoints."""
