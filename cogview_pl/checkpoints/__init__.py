"""Weights on disk: model folders, adapter folders and released checkpoints."""
