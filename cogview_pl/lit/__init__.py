"""The Lightning side: one module per stage, the data module, callbacks. Nothing else knows Lightning but tasks/."""
