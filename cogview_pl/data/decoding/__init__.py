"""Image files become pixels: formats, sizes, colours, damage."""
