"""Faster forms of single operations, and where they can run: oneDNN on CPUs, Triton and channels-last on GPUs."""
