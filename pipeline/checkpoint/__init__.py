"""Models as they are stored."""
