"""Numbers on images: feature networks, reconstruction and generation metrics, their protocol."""
