"""Renders views of a batch on its device: crops, augmented pairs, detector inputs."""
