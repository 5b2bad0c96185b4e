"""Contents of checkpoints as `raymerge inspect` shows them."""
