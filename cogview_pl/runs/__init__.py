"""A run: its folder, lock, processes, files and report."""
