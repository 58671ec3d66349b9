"""Transformers of the families: one forward of one block; no loop, no sampling, no policy."""
