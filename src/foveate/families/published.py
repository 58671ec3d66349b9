"""The published models by their friendly names, as the records of the families list them.

The pairing is strict: a transformer generates noise with another autoencoder, also where the shapes agree.
"""

from foveate.families.registry import FAMILIES
from foveate.families.spec import Published

PUBLISHED: dict[str, Published] = {entry.spec.name: entry for family in FAMILIES for entry in family.published()}
"""Every published model that has a name here."""
