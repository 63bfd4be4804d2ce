"""Figures for people: heatmaps, detections, discoveries, retrieval galleries, region overlays, sweeps, comparisons."""
