"""Verbs, one per file: what a task does once its configuration is composed."""
