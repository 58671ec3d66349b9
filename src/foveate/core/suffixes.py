"""Endings of image files that can be written; apart from what writes them, which loads an image library."""

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Endings and their formats; upper case does too."""
