"""Displays in a terminal: of merges, evaluations and searches."""
