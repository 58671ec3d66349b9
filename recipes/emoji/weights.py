"""Sampling probability of each drawing: symbols and flags less, skin tones never more than a share of all draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from foveate.core.errors import FoveateError
from recipes.emoji.captions import Drawing

_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawWeights:
    """Factors of the drawings' weights; a drawing gets the product of those that fit it, each at least 0.

    Attributes:
        groups: By Unicode group, such as "flags".
        subgroups: By Unicode subgroup, such as "food-fruit".
        labels: By label.
        skin_tone_share: Most that all skin-tone variants together get, in [0, 1).
    """

    groups: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"symbols": 0.3, "flags": 0.3}))
    subgroups: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    labels: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    skin_tone_share: float = 0.15

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            FoveateError: If a factor is negative or the share is out of range.
        """
        for factors in (self.groups, self.subgroups, self.labels):
            for name, factor in factors.items():
                if not factor >= 0:
                    raise FoveateError(f"the weight of {name!r} must be at least 0, got {factor}")
        if not 0 <= self.skin_tone_share < 1:
            raise FoveateError(f"skin_tone_share must be in [0, 1), got {self.skin_tone_share}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DrawWeights":
        """Makes weights from parsed YAML: `{groups: {flags: 0.3}, subgroups: {food-fruit: 2}}`.

        Raises:
            FoveateError: If a key is unknown, a value is not a number or out of range.
        """
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key == "skin_tone_share":
                made[key] = _number(key, value)
            elif key in {"groups", "subgroups", "labels"} and isinstance(value, Mapping):
                made[key] = {str(name): _number(str(name), factor) for name, factor in value.items()}
            else:
                raise FoveateError(f"weights: {key} must be a mapping groups, subgroups or labels, got {value!r}")
        return cls(**made)


def drawing_weights(drawings: Sequence[Drawing], config: DrawWeights) -> Float[np.ndarray, " n"]:
    """Returns the probability of each drawing; they add up to 1.

    Raises:
        FoveateError: If a name in the config fits no drawing, or nothing has weight.
    """
    _check_names(drawings, config)
    weights = np.array(
        [
            config.groups.get(one.group, 1.0)
            * config.subgroups.get(one.subgroup, 1.0)
            * config.labels.get(one.label, 1.0)
            for one in drawings
        ]
    )
    has_tone = np.array([is_skin_tone(one) for one in drawings])
    tones, others = weights[has_tone].sum(), weights[~has_tone].sum()
    # Without others there is nothing to hold the tones against.
    if others > 0 and tones > config.skin_tone_share * (tones + others):
        weights[has_tone] *= config.skin_tone_share / (1 - config.skin_tone_share) * others / tones
    total = weights.sum()
    if not total > 0:
        raise FoveateError("weights must leave at least one drawing, they leave none")
    return np.asarray(weights / total)


def is_skin_tone(drawing: Drawing) -> bool:
    """Says whether a drawing is the variant of another in a skin tone."""
    return not _SKIN_TONES.isdisjoint(drawing.code_point.split("-"))


def _check_names(drawings: Sequence[Drawing], config: DrawWeights) -> None:
    # Groups have defaults, and a corpus need not have them all.
    for asked, known in (
        (config.subgroups, {one.subgroup for one in drawings}),
        (config.labels, {one.label for one in drawings}),
    ):
        unknown = sorted(set(asked) - known)
        if unknown:
            raise FoveateError(f"weights must name what the drawings have, got {', '.join(map(repr, unknown))}")


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FoveateError(f"weights: {key} must be a number, got {value!r}")
    return float(value)
