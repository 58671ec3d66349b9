"""Objects that somebody else loaded with other code, drawn by our engine."""
