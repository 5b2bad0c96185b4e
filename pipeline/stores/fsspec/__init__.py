"""Stores behind fsspec."""
