"""Bulk generation: rows in, shards of images with a manifest out, across interruptions and machines."""
