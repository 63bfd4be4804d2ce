"""Renders training views of a batch on the device."""
