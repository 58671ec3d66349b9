"""What ran where, drawn over the image."""
