"""Search of a recipe's parameters for the best models."""
