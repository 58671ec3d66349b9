"""The text encoders whose weights lie in a model's own folder (`foveate.weights.folder`)."""

from foveate.families.family import Conditioning

MINILM = Conditioning(name="minilm", parameters=22_565_376)
MINILM_PLACES = Conditioning(name="minilm-places", parameters=22_565_376 + 316_553, has_places=True)
"""The same, with a position tagger."""

OWN = (MINILM, MINILM_PLACES)
