"""The memory estimate: training steps played on fake tensors, arithmetic for inference, and the table of `plan=true`."""
