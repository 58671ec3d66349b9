"""Which networks, conditioners, sizes and defaults belong together, and how they are found and loaded."""
