"""From a fine-tune and its base to a LoRA adapter."""
