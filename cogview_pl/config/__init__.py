"""The configuration: schema, choices of keys, limits of numbers."""
