"""Obeys plans; knows no policy, model or tokenizer by name."""
