"""LoRA adapters, as PEFT saves them, applied to a model while its tensors are read."""
