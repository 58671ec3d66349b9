"""Trivial controls, and by how much a policy beats them.

A policy beats a control by x dB if no setting of the control that is at least as fast comes within x dB of its mean
PSNR. As fast: the median time of the transformer, of calls that took turns in one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.policy import Directive, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.eval.statistics import Interval, interval
from foveate.policies.registry import load_policy

CONTROLS = (
    *(f"skip-scales:count={count}" for count in (1, 2, 3)),
    *(f"drop-branch:count={count}" for count in (1, 2, 3, 4)),
    *(f"random-tokens:num_scales={count}" for count in (1, 3)),
    *(f"uniform-depth:num_scales={count}" for count in (1, 3)),
    "late-bfloat16",
)
"""Every setting that a method is held against, where a schedule allows it."""

ANOTHER_SEED = "another seed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """A policy or a setting of a control, as both are compared.

    Attributes:
        control: Name of the control, such as `skip-scales`.
        setting: Its spec.
        cost: Median milliseconds of the transformer; any other number that orders times will do.
        psnrs: PSNR of every image, prompt-major, NaN where it could not be scored.
        mean_psnr: Their mean.
    """

    control: str
    setting: str
    cost: float
    psnrs: tuple[float, ...]
    mean_psnr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A policy against the best setting of one control that is at least as fast.

    Attributes:
        by_db: Its mean PSNR less the setting's; negative where the control is better, None where no setting is as fast.
        setting: That setting.
        interval: Where the difference lies, paired by prompt and seed.
    """

    by_db: float | None
    setting: str | None
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        ends = self.interval and [self.interval.low, self.interval.high]
        return {"by_db": self.by_db, "setting": self.setting, "interval": ends}


def valid_controls(schedule: ScaleSchedule, shape: ModelShape, dtype: torch.dtype) -> list[Policy]:
    """The settings of `CONTROLS` that a schedule allows and that do something on it."""
    found: list[Policy] = []
    for spec in CONTROLS:
        policy = load_policy(spec)
        try:
            bound = policy.bind(schedule, shape)
        except FoveateError:
            continue
        # A model that computes in bfloat16 has nothing to narrow.
        is_narrow_already = bound.directives == (Directive.DTYPE,) and dtype == torch.bfloat16
        if bound.directives and not is_narrow_already:
            found.append(policy)
    return found


def beats(policy: Contest, controls: Sequence[Contest], num_prompts: int) -> dict[str, Beat]:
    """A policy against every control, by the control's name; its own settings are no control of it."""
    found: dict[str, Beat] = {}
    for name in dict.fromkeys(control.control for control in controls if control.control != policy.control):
        rivals = [c for c in controls if c.control == name and c.cost <= policy.cost]
        best = max(rivals, key=lambda rival: rival.mean_psnr, default=None)
        found[name] = (
            Beat(by_db=None, setting=None, interval=None) if best is None else _lead(policy, best, num_prompts)
        )
    return found


def _lead(policy: Contest, best: Contest | None, num_prompts: int) -> Beat:
    if best is None:
        return Beat(by_db=None, setting=None, interval=None)
    return Beat(
        by_db=policy.mean_psnr - best.mean_psnr,
        setting=best.setting,
        interval=interval(np.subtract(policy.psnrs, best.psnrs), num_prompts),
    )


def beats_all_by(found: Sequence[Beat]) -> float | None:
    """The smallest lead over any control; None where no setting of any of them is as fast."""
    return min((beat.by_db for beat in found if beat.by_db is not None), default=None)
