"""Pretraining objectives, one module for each: `ntxent`, `anchor_ntxent`, `detcon`, `detco`."""
