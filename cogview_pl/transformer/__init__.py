"""Stage 2: the transformer over text and image tokens, its loss, LoRA, and how it is divided among devices."""
