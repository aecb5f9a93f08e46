"""Everything that knows Lightning: a module per stage, the data module, optimizers, strategies, callbacks."""
