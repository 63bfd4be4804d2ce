"""Sweeps: search over configurations with Ray Tune, final runs, leaderboard."""
