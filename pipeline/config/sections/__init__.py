"""Sections of the YAML, one file each."""
