"""What a run will cost, and sending it to a cluster."""
