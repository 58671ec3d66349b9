"""How near a picture comes to a full run (fidelity) and how good it is by itself (quality)."""
