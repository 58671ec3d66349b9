"""What the HTML page shows, as data: whoever measured fills it, `page.render` draws it.

A number that is missing, NaN or infinite is shown as "n/a"; text may be anything, also markup.

Axes: Y pixel rows, X columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from foveate.core.errors import FoveateError
from foveate.core.schedule import Grid
from foveate.viz.metrics import METRICS, Metric, metric
from foveate.viz.scale_map import ScaleMap


class Role(StrEnum):
    """What a point of the frontier stands for; it decides the point's mark."""

    POLICY = "policy"
    CONTROL = "control"
    REFERENCE = "reference"
    SEED = "seed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number, with its interval if one is known."""

    value: int | float | None
    low: int | float | None = None
    high: int | float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """One policy with everything that was measured about it: a point of the plot, and a row of the table.

    Attributes:
        name: Spec of the policy, unique in the page; or what is said instead, such as "another seed".
        role: A control, the reference and another seed look different from a policy.
        figures: By dotted name, such as `psnr.mean`; `metrics.METRICS` has those that the page knows by label and unit.
        series: Points of the same series are settings of one method; they are joined by a line.
        details: What else is said about it, such as its fingerprint; names and values.
    """

    name: str
    role: Role = Role.POLICY
    figures: Mapping[str, Figure]
    series: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImagePair:
    """One image of a policy beside its reference.

    Attributes:
        policy: Name of the `FrontierPoint` that it belongs to.
        prompt: As it was given.
        seed: Of both.
        reference: uint8 RGB; equal references of several policies are stored once.
        picture: uint8 RGB of the same size.
        figures: Of this pair, by the dotted names without statistic: `psnr`, `ssim`, `flip`, ...
        is_identical: Equal bytes.
        flip: FLIP map of the pair in [0, 1], if it was computed.
        scales: What ran for `picture`, from `scale_map.scale_maps(trace, index in the batch)`; empty if not recorded.
    """

    policy: str
    prompt: str
    seed: int
    reference: UInt8[np.ndarray, "Y X 3"]
    picture: UInt8[np.ndarray, "Y X 3"]
    figures: Mapping[str, int | float | None]
    is_identical: bool = False
    flip: Float[np.ndarray, "Y X"] | None = None
    scales: tuple[ScaleMap, ...] = ()

    def __post_init__(self) -> None:
        if self.reference.shape != self.picture.shape:
            raise FoveateError(f"a pair has one size, got {self.reference.shape} and {self.picture.shape}")
        if self.flip is not None and self.flip.shape != self.picture.shape[:2]:
            raise FoveateError(f"a FLIP map has the size of its pair, got {self.flip.shape} for {self.picture.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleTime:
    """Milliseconds of one scale of one policy.

    Attributes:
        policy: Name of the `FrontierPoint` that it belongs to.
        scale: Index in the full schedule.
        grid: Rows and columns of tokens.
        ms: Median, with an interval if one is known; 0 where the scale did not run.
    """

    policy: str
    scale: int
    grid: Grid
    ms: Figure


Cell = str | int | float | Figure | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows under column names; numbers are set to the right and can be sorted."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        wrong = next((row for row in self.rows if len(row) != len(self.columns)), None)
        if wrong is not None:
            raise FoveateError(f"a row has {len(self.columns)} cells, got {len(wrong)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartPoint:
    """A point of a chart; `label` is what its tooltip says, and a faint one broke a bound."""

    x: int | float
    y: Figure
    label: str = ""
    is_faint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartSeries:
    """Points of one colour, joined by a line if they are to be read in order."""

    name: str
    points: tuple[ChartPoint, ...]
    is_line: bool = False
    is_step: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A plot of a sweep or of a tuning's history.

    Attributes:
        caption: What it shows.
        x_label: With unit.
        y_label: With unit.
        series: In the order of the legend.
        limit: A bound on y, drawn as a dashed line.
    """

    caption: str
    x_label: str
    y_label: str
    series: tuple[ChartSeries, ...]
    limit: int | float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lead:
    """What a command puts on top of the page: the table of a sweep, the history of a tuning.

    Attributes:
        heading: Such as "Tuning".
        text: A sentence or two on what came out.
        charts: In order.
        tables: In order, below the charts.
        files: Text to copy, by name: the tuned policy as YAML.
    """

    heading: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PageData:
    """Everything on the page.

    Attributes:
        title: Such as "fovea against full".
        summary: A sentence below it: what was compared on what.
        points: All policies, controls, the reference, another seed.
        headline: Name of the point whose figures stand in the tiles at first; None takes the first policy.
        pairs: Images; the page shows the worst ones of every policy first.
        scale_times: Of any number of policies.
        facts: Model, machine, versions, date: names and values.
        command: What to type to get this again.
        config: Everything that was set, as plain data.
        notes: Warnings and what a reader should know, one line each.
        lead: What a command puts on top.
        num_pairs: Images that were scored, where there are more than in `pairs`.
        metrics: How figures are printed that `metrics.METRICS` does not know, by dotted name.
        pairing: What both images of a pair have in common, as a sentence.
    """

    title: str
    summary: str
    points: tuple[FrontierPoint, ...]
    headline: str | None = None
    pairs: tuple[ImagePair, ...] = ()
    scale_times: tuple[ScaleTime, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    lead: Lead | None = None
    num_pairs: int = 0
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    pairing: str = "The same prompt, seed and random numbers on both sides."

    def metric(self, name: str) -> Metric:
        """How a figure is printed."""
        return METRICS.get(name) or self.metrics.get(name) or metric(name)

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if not names:
            raise FoveateError("a page needs at least one point, got none")
        if len(set(names)) < len(names):
            raise FoveateError(f"points have different names, got {names}")
        used = [pair.policy for pair in self.pairs] + [time.policy for time in self.scale_times]
        used += [] if self.headline is None else [self.headline]
        strangers = sorted(set(used) - set(names))
        if strangers:
            raise FoveateError(f"no point is named {strangers[0]!r}; there are {names}")
