"""Merge arithmetic on blocks of tensors. Knows nothing of files."""
