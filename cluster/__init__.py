"""Starts a cluster on this machine (`local`), and renders files that start one elsewhere (`render`). Knows nothing of the runs."""
