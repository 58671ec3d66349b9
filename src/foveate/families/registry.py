"""The families: one line each. What a family is stands in its record."""

from foveate.core.errors import CheckpointError
from foveate.families import hart, infinity, switti, var
from foveate.families.family import Family

FAMILIES: tuple[Family, ...] = (infinity.FAMILY, var.FAMILY, switti.FAMILY, hart.FAMILY)


def family_named(name: object) -> Family:
    """The family of a name out of a file.

    Raises:
        CheckpointError: There is none; the families are listed.
    """
    found = next((family for family in FAMILIES if family.name == name), None)
    if found is None:
        raise CheckpointError(f"family must be one of {', '.join(family.name for family in FAMILIES)}, got {name!r}")
    return found
