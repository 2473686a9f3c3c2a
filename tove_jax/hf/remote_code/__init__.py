"""Source of the files that an exported student with LoRA experts carries; they need only transformers."""
