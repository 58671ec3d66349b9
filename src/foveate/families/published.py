"""The published models by their friendly names, as the records of the families list them.

The pairing is strict: a transformer generates noise with another autoencoder, also where the shapes agree.
"""

from foveate.families.registry import FAMILIES
from foveate.families.spec import Published

PUBLISHED: dict[str, Published] = {entry.spec.name: entry for family in FAMILIES for entry in family.published()}
"""Every published model that has a name here."""

ALIASES: dict[str, str] = {alias: name for name, entry in PUBLISHED.items() for alias in entry.aliases}
"""Other names of these models."""


def published_model(name: str) -> Published | None:
    """The published model of a name, or None."""
    return PUBLISHED.get(ALIASES.get(name, name))
