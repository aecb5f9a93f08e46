"""The command line: quoting of overrides, messages, output streams, the table of a sweep."""
