"""Configuration to objects: models, data, trainer, pipelines, and checks of what goes together."""
