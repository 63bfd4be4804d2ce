"""Short example programs that use a run's results; the test suite runs them."""
