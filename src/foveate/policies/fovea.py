"""Fovea: on the last scales a lattice of tokens runs, and the others draw from its logits with their own numbers.

A rule that picks tokens by a score leaves holes, and holes are a coherent error; a regular lattice of the same size has
none. A token beside the lattice takes the logits around it, weighted by distance and by likeness of the input, and
draws against its own keyed random numbers: a bit near a fair coin is decided by its number, one far from it by its
neighbours. It draws softly, times a confidence that is measured on the tokens that ran. The unconditional branch runs
on a part of the lattice, and the difference of the branches is spread in the same way. Counts and tokens are static.
Ours; docs/policies/fovea.md has the formulas (`engine/spread.py`) and where it fails.
Axes: l tokens of a scale.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.plan import Base, ScalePlan, Spread, SpreadDifference
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals
from foveate.policies.lattice import dither_rank, lowest

_PATH: tuple[tuple[float, tuple[float, ...], tuple[float, ...]], ...] = (
    (0.0, (0.5, 0.25, 0.125), (0.5, 0.5, 0.5)),
    (0.1, (1.0, 0.5, 0.25), (1.0, 0.5, 0.5)),
    (0.3, (1.0, 0.5, 0.5), (1.0, 0.5, 0.5)),
    (0.6, (1.0, 1.0, 0.5), (1.0, 1.0, 0.5)),
    (0.85, (1.0, 1.0, 1.0), (1.0, 1.0, 0.5)),
    (1.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
)
"""Levels of the dial: shares and guided shares of the last three scales, between these by straight lines.

What costs least fidelity goes first: half of the guidance, half of the last scale, then the scale before it."""


class BoundFovea(Bound):
    """Shares by the scale's index."""

    def __init__(self, policy: "Fovea", schedule: ScaleSchedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.shares = _by_scale(policy.shares, len(schedule))
        self.spread = Spread(sigma=policy.sigma, likeness=policy.likeness, softness=policy.softness)
        self.guided = _by_scale(policy.guided_shares, len(schedule))
        promised = {
            Directive.TOKENS: any(share < 1 for share in self.shares.values()),
            Directive.GUIDED_TOKENS: any(0 < share < 1 for share in self.guided.values()),
            Directive.BRANCH: any(share == 0 for share in self.guided.values()),
        }
        self.directives = tuple(directive for directive, is_so in promised.items() if is_so)

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """The lowest thresholds of an ordered dither."""
        return self._planned(scale, dither_rank(self.schedule.grids[scale])), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens, the first ones."""
        return self._planned(scale, torch.arange(self.schedule.scales[scale].num_tokens, device="cpu"))

    def _planned(self, scale: int, rank_l: Int[Tensor, " l"]) -> ScalePlan:
        policy, share, guided = self.policy, self.shares.get(scale, 1.0), self.guided.get(scale, 1.0)
        is_part = 0 < guided < 1
        return ScalePlan(
            selections=(lowest(rank_l, share),) if share < 1 else (),
            base=self.spread if share < 1 else Base.ZERO,
            unconditional=(False,) if guided == 0 else None,
            unconditional_tokens=(lowest(rank_l, guided),) if is_part else (),
            difference=SpreadDifference(sigma=policy.sigma, likeness=policy.guidance_likeness) if is_part else None,
        )


def _by_scale(shares: tuple[float, ...], num_scales: int) -> dict[int, float]:
    """Shares of the last scales by their index; scale 0 runs in full."""
    first = num_scales - len(shares)
    return {first + i: share for i, share in enumerate(shares) if first + i > 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fovea(Policy):
    """On the last scales, one entry each, `shares` of the tokens run, in (0, 1].

    Of these the unconditional branch runs `guided_shares`, in [0, 1]; 0 drops it, which holds for all later scales.
    `sigma` (grid steps) and `likeness` say how far logits are spread, `guidance_likeness` the difference of the
    branches; `softness` is the temperature of bits that were not computed. All four are above 0.
    """

    name: ClassVar[str] = "fovea"
    dial: ClassVar[str] = "shares and guided_shares"
    shares: tuple[float, ...] = (0.75, 0.5)
    guided_shares: tuple[float, ...] = (1.0, 0.5)
    sigma: float = 1.0
    likeness: float = 0.3
    guidance_likeness: float = 0.5
    softness: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(all(0 < share <= 1 for share in self.shares), "shares", "in (0, 1]", self.shares)
        guided = self.guided_shares
        require(all(0 <= share <= 1 for share in guided), "guided_shares", "in [0, 1]", guided)
        returns = any(a == 0 < b for a, b in pairwise(guided))
        require(not returns, "guided_shares", "0 after a 0, as a dropped branch never returns", guided)
        for name in ("sigma", "likeness", "guidance_likeness", "softness"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, "a finite number above 0", value)

    @classmethod
    def neutral(cls) -> "Fovea":
        """All tokens in both branches."""
        return cls(shares=(), guided_shares=())

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "Fovea":
        """Thins the guidance of the last scale first, then its tokens, then the scales before it (`_PATH`)."""
        (low, *below), (high, *above) = next(pair for pair in pairwise(_PATH) if level <= pair[1][0])
        along = (level - low) / (high - low)
        shares, guided = (
            tuple(round(a + along * (b - a), 4) for a, b in zip(less, more, strict=True))
            for less, more in zip(below, above, strict=True)
        )
        return self.replace(shares=shares, guided_shares=guided)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule."""
        return BoundFovea(self, schedule)
