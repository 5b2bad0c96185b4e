"""Decoders: from stored bytes to values, such as those of a model with an adapter or of rows in another order."""
