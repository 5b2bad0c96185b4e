"""What models can do, and how many tokens they take for it."""
