"""LoRA adapters that are merged among each other: checks, tensors and config of the one that is made."""
