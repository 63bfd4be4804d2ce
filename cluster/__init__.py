"""Where runs happen beside this machine's own process: a cluster brought up here, and files that bring one up elsewhere."""
