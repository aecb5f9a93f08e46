"""How much memory a run takes: steps played through on tensors without memory, and the arithmetic around them."""
