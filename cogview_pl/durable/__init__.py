"""Durable files: atomic writes, and reads with size limits."""
