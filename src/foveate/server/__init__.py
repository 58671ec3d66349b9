"""Serves a pipeline: a scheduler that packs requests scale by scale, and OpenAI's images API in front of it."""
