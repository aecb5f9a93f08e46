"""Verbs, one per file: each runs a task from its composed configuration."""
