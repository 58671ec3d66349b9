"""Conditions on figures, such as `ssim.p10 >= 0.88`, and which figures there are."""

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from foveate.core.errors import FoveateError, unknown
from foveate.eval.judges import Judge
from foveate.eval.pairs import ERRORS, SCORES
from foveate.policies.registry import load_policy

_BOUND = re.compile(
    r"\s*(?:(?P<policy>\S.*?)\s+)?(?P<figure>[a-z_][a-z0-9_.]*)\s*(?P<comparison>>=|<=|==|>|<)\s*"
    r"(?P<limit>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*"
)
_OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
_ENDS = (".low", ".high")

_SPEEDUPS = ("transformer", "decoder", "end_to_end")
_SPREAD = ("median", "p10", "p90")
_SCORE_PARTS, _ERROR_PARTS = ("mean", "p10", "min"), ("mean", "p90", "max")

WITH_INTERVAL = (
    *(f"{name}.{part}" for name in SCORES for part in _SCORE_PARTS),
    *(f"{name}.{part}" for name in ERRORS for part in _ERROR_PARTS),
    *(f"speedup.{part}" for part in _SPEEDUPS),
)
"""Figures that also come with `.low` and `.high`, the ends of their 95 % interval."""

FIGURES = (
    *WITH_INTERVAL,
    *(f"speedup.{part}.{end}" for part in _SPEEDUPS for end in ("p10", "p90")),
    *(f"{name}.{part}" for name in ("latency_ms", "transformer_ms") for part in _SPREAD),
    "flops_ratio", "beats_controls_by_db", "yardstick_psnr", "identical", "constant.images", "constant.references",
    "n", "runs",
)  # fmt: skip
"""Every number that a bound can be about, by its dotted name; judges add theirs."""


def figures_of(judges: Iterable[Judge]) -> tuple[str, ...]:
    """The figures that judges add, by name."""
    return tuple(
        f"{judge.name}.{part}" for judge in judges for part in (_ERROR_PARTS if judge.is_error else _SCORE_PARTS)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureBound:
    """A condition on one figure.

    Attributes:
        text: As it was written.
        policy: Spec of the policy that it is about; None for every policy in question.
        figure: Dotted name.
        comparison: `>=`, `<=`, `==`, `>` or `<`.
        limit: The number behind it.
    """

    text: str
    policy: str | None
    figure: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str, judged: Sequence[str] = ()) -> "FigureBound":
        """Reads a bound: `[POLICY] FIGURE COMPARISON NUMBER`.

        Args:
            text: Such as `ssim.p10 >= 0.88` or `skip-scales:count=2 psnr.mean < 30`.
            judged: Figures of judges.

        Raises:
            FoveateError: It is written otherwise, or there is no such figure or policy.
        """
        match = _BOUND.fullmatch(text)
        if match is None:
            raise FoveateError(f'a bound is written like "ssim.p10 >= 0.88", got {text!r}')
        name = match["figure"]
        end = next((end for end in _ENDS if name.endswith(end)), "")
        with_interval = (*WITH_INTERVAL, *judged)
        if name.removesuffix(end) not in (with_interval if end else (*FIGURES, *judged)):
            known = (*FIGURES, *judged)
            raise unknown(
                "figure", name, known, "; .low and .high behind those of images and speedups are their interval"
            )
        policy = match["policy"]
        return cls(
            text=text.strip(),
            policy=None if policy is None else load_policy(policy).spec,
            figure=name,
            comparison=match["comparison"],
            limit=float(match["limit"]),
        )

    @property
    def is_interval(self) -> bool:
        """Whether it is about an end of an interval."""
        return self.figure.endswith(_ENDS)

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether it is true of these figures.

        Raises:
            FoveateError: The figure was not measured.
        """
        return bool(_OPERATORS[self.comparison](self.value(figures), self.limit))

    def violation(self, figures: Mapping[str, float]) -> float:
        """How far it is from holding, in the figure's unit; 0 or less where it holds.

        Raises:
            FoveateError: The figure was not measured.
        """
        distance = self.limit - self.value(figures)
        if self.holds(figures):
            return -abs(distance) if self.comparison != "==" else 0.0
        return max(abs(distance), math.ulp(self.limit))

    def value(self, figures: Mapping[str, float]) -> float:
        """The figure.

        Raises:
            FoveateError: It was not measured.
        """
        found = figures.get(self.figure, math.nan)
        if math.isnan(found):
            why = "an interval needs two prompts or more" if self.is_interval else "see its condition in docs/cli.md"
            raise FoveateError(f"{self.figure} was not measured here: {why}")
        return found
