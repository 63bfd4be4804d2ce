"""What is done with a finished run: evaluate, export, promote."""
