"""Connects commands to Ray, passes credentials to its processes, and holds every use of its private names."""
