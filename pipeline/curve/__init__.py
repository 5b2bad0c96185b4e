"""Accuracy against tokens of evaluated models: page, pictures, table and choice."""
