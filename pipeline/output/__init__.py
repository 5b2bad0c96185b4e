"""The output directory: its journal, its files, and what makes them a model."""
