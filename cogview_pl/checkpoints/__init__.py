"""Weights on disk: our own model folders, released checkpoints."""
