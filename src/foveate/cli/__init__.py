"""The command line: one file per command, torch imported only when needed."""
