"""Distributed training: ranks, gathers with gradient, gradient caching."""
