"""Runs models loaded by their official code on our engine."""
