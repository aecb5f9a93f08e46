"""Foreign .pt files, read without running anything in them."""
