"""Merge LLM checkpoints block by block, in bounded memory."""

__version__ = "0.1.0"


class RaymergeError(Exception):
    """Something the user can put right; the CLI prints it in one block and exits with 2."""
