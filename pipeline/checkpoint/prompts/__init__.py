"""Prompts as tokens, and the hidden states that a model makes of them."""
