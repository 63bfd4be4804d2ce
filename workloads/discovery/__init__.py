"""Object discovery without labels: LOST, TokenCut and baselines on a trunk's features; tables of boxes and their clusters."""
