"""Connects commands to Ray, and holds every use of its private names."""
