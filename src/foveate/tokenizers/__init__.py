"""Latents to bits or ids and back, and latents to pixels."""
