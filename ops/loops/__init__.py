"""Compiled loops, their compiler, and the cache of their machine code."""
