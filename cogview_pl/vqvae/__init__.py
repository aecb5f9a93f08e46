"""Stage 1: the image tokenizer. Images `(B, 3, Y, X)` to codes `(B, y, x)` and back."""
