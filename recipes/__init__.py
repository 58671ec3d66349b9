"""How the bundled models are made; run from a clone."""
