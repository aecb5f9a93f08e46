"""Reader of foreign .pt files that runs no code of theirs."""
