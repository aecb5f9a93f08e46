"""Tokenised data sets on disk: our token store, and the .bin files of the original program."""
