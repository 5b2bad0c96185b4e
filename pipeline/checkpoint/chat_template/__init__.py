"""Chat templates: how models have them, those with names, and what they come to."""
