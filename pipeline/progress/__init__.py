"""What happens during a merge, as events, and how it is told."""
