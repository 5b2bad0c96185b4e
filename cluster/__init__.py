"""Runners: they apply a function to items, each with its resources, and know nothing of tensors."""
