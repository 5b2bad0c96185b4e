"""Running work on Ray."""
