"""From configuration to objects: models, data, trainer, pipelines, and checks of options that exclude each other."""
