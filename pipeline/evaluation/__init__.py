"""Evaluation of models: their accuracy, and the tokens that they take for it."""
