"""What ran where, drawn over the image, and the report as one HTML page."""
