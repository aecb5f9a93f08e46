"""A run: its folder, its lock, its processes, the files that it writes, its report."""
