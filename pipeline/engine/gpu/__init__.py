"""Merging on GPUs: devices, streams, rooms for sources, and stages."""
