"""Images of twice the edge, by overlapping windows."""
