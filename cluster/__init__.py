"""Where things run: a function over items, each with its resources. Knows nothing of tensors."""
