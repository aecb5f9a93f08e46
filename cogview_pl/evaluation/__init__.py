"""Metrics of images: feature networks, reconstruction and generation metrics, and their protocol."""
