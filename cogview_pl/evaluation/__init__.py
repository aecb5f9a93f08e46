"""Numbers on pictures: feature networks, reconstruction and generation metrics, their protocol."""
