"""The vocabulary of an output: its tokenizer, its rows of embeddings, its chat template, and token numbers."""
