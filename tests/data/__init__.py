"""Tests of workloads.data."""
