"""Bulk generation: rows of a file in, shards of images with a manifest out, resumable at any instruction."""
