"""Manifests with which schedulers run a merge on many machines: one pure function for each scheduler."""
