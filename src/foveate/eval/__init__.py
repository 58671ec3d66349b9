"""How near an image comes to a full run (fidelity) and how good it is by itself (quality)."""
