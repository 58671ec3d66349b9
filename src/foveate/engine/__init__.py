"""Runs plans; independent of concrete policies, models and tokenizers."""
