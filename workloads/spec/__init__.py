"""The pretraining config, and what is built from it."""
