"""Tokenizers: what a model's files say of its tokens, and the files of an output whose tokens are those of several."""
