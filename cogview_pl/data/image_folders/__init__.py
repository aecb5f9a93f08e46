"""Folders of images: which files there are, and which captions belong to them."""
