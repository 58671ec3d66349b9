"""Turns a budget into a setting: turns the dial of a policy until what it costs is what was asked for.

What a setting costs is the caller's to say, as a function: FLOPs over those of the full run (`fit_share`), or
milliseconds on a machine that was measured (`fit_below`). A dial is a level in [0, 1] (`Policy.at_level`); of a
composition it is that of the first part that has one, a coarse one only if there is no other; the other parts stay.
"""

from collections.abc import Callable
from dataclasses import dataclass

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy, refuse_spread
from foveate.core.schedule import ScaleSchedule
from foveate.policies.depthvar import DepthVAR
from foveate.policies.fovea import Fovea
from foveate.policies.full import Full
from foveate.policies.registry import all_policies, join

TOLERANCE = 0.02
"""How far the compute of a fitted setting may be from the budget, as a share of the budget."""

_CLOSE = 2e-3
"""From here on a search ends early."""
_FINEST = 5e-5
"""Levels that are nearer to each other give the same setting of a share with four places."""


def dialled(policy: Policy) -> Policy:
    """A policy whose dial can meet a budget; `full` stands for the default family (`Dial.of`).

    Raises:
        FoveateError: No part of it has a dial.
    """
    if policy == Full() or any(part.dial for part in policy.parts_of()):
        return policy
    known = ", ".join(name for name, kind in all_policies().items() if kind.dial)
    raise FoveateError(
        f"no budget can be set for {policy.spec}: its compute is not known before the run, or it has no setting for "
        f"it; take one of {known}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """A policy, or a composition, whose part number `place` is turned."""

    policy: Policy
    place: int
    schedule: ScaleSchedule
    shape: ModelShape

    @classmethod
    def of(cls, policy: Policy, schedule: ScaleSchedule, shape: ModelShape) -> "Dial":
        """The dial of a policy; `full` has none and stands for fovea, or for DepthVAR where a token holds an id.

        Raises:
            FoveateError: No part has a dial, or the one that is turned spreads logits where a token holds an id.
        """
        default = Fovea() if shape.draws_bits else DepthVAR()
        policy = default if policy == Full() else dialled(policy)
        places = [place for place, part in enumerate(policy.parts_of()) if part.dial]
        place = min(places, key=lambda place: policy.parts_of()[place].is_dial_coarse)
        dial = cls(policy=policy, place=place, schedule=schedule, shape=shape)
        refuse_spread(dial.at(0.0).parts_of()[place].bind(schedule, shape), len(schedule), shape)
        return dial

    @property
    def name(self) -> str:
        """The field, or fields, that it sets."""
        return self.policy.parts_of()[self.place].dial

    def at(self, level: float) -> Policy:
        """The setting at a level."""
        parts = list(self.policy.parts_of())
        parts[self.place] = parts[self.place].at_level(level, self.schedule, self.shape)
        return join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A policy at a level of its dial, and what it costs."""

    level: float
    cost: float
    policy: Policy


def fit_share(dial: Dial, budget: float, cost_of: Callable[[Policy], float]) -> Policy:
    """The setting whose share of the full compute is nearest to the budget, within 2 % of it.

    Args:
        dial: Of the policy.
        budget: The share, in (0, 1].
        cost_of: The share that a setting spends, before it runs.

    Raises:
        FoveateError: No setting is that near; the message names what the dial reaches, and what lies nearest.
    """
    found = _search(dial, budget, cost_of)
    best = min(found, key=lambda setting: abs(setting.cost - budget))
    if abs(best.cost / budget - 1) <= TOLERANCE:
        return best.policy
    least, most = (_percent(pick(setting.cost for setting in found)) for pick in (min, max))
    reach = f"{dial.policy.spec}: {dial.name} reaches {least} to {most} of the FLOPs on this schedule"
    if _is_outside(found, budget):
        raise FoveateError(f"{reach}, not {_percent(budget)}; ask for a share in between, or take another policy")
    below = max((setting for setting in found if setting.cost < budget), key=lambda setting: setting.cost)
    above = min((setting for setting in found if setting.cost > budget), key=lambda setting: setting.cost)
    near = " and ".join(f"{_percent(setting.cost)} ({setting.policy.spec})" for setting in (below, above))
    raise FoveateError(f"{reach} in steps; nearest to {_percent(budget)} are {near}; ask for one of these shares")


def fit_below(dial: Dial, limit: float, cost_of: Callable[[Policy], float]) -> Setting:
    """The setting of the most cost that is not above a limit; that of the least where all are."""
    found = _search(dial, (1 - _CLOSE) * limit, cost_of)
    fitting = [setting for setting in found if setting.cost <= limit]
    return max(fitting, key=lambda setting: setting.level) if fitting else min(found, key=lambda each: each.cost)


def _is_outside(found: list[Setting], wanted: float) -> bool:
    return not min(setting.cost for setting in found) < wanted < max(setting.cost for setting in found)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _search(dial: Dial, wanted: float, cost_of: Callable[[Policy], float]) -> list[Setting]:
    """Settings around a cost: both ends, and what interpolation, and every third time bisection, meets on the way."""

    def setting_at(level: float) -> Setting:
        policy = dial.at(level)
        known = next((setting for setting in found if setting.policy == policy), None)
        return Setting(level=level, cost=cost_of(policy) if known is None else known.cost, policy=policy)

    found: list[Setting] = []
    low, high = setting_at(0.0), setting_at(1.0)
    found += [low, high]
    turn = 0
    while high.level - low.level > _FINEST and not _is_outside([low, high], wanted):
        weight = (wanted - low.cost) / (high.cost - low.cost) if turn % 3 < 2 else 1 / 2
        middle = setting_at(low.level + min(max(weight, 0.01), 0.99) * (high.level - low.level))
        found.append(middle)
        if abs(middle.cost / wanted - 1) < _CLOSE:
            break
        low, high = (middle, high) if middle.cost < wanted else (low, middle)
        turn += 1
    return found
