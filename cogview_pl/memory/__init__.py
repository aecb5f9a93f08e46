"""The memory estimate: training steps played on fake tensors, inference by arithmetic, and the table of plan=true."""
