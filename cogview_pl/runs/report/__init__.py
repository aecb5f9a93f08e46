"""report.html of a chain."""
