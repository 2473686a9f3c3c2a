"""What is added to an encoder: LoRA experts with their router, and encoder adapters."""
