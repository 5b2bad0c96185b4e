"""Generates answers and measures losses, in processes of their own."""
