"""Short programs that use what a run leaves: run in the test suite, to be copied from."""
