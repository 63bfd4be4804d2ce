"""Works on finished runs: evaluates, exports and promotes their models."""
