"""Object discovery over a dataset with Ray actors."""
