"""What a measurement found: per size and batch, per policy, figures with their spread; as JSON and as CSV."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from foveate.bench.peak import MatmulPeak
from foveate.bench.rounds import Stop
from foveate.bench.spread import Spread
from foveate.bench.workload import Picture
from foveate.core.schedule import Grid

_CSV_COLUMNS = ("width", "height", "batch", "side", "policy", "figure", "median", "p10", "p90", "rounds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleFigures:
    """One scale of one policy; `flops`, `token_blocks` (tokens times blocks, all rows) and `blocks` are medians."""

    scale: int
    grid: Grid
    ms: Spread
    flops: float
    token_blocks: float
    blocks: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "scale": self.scale,
            "grid": list(self.grid),
            "ms": self.ms.to_json(),
            "flops": self.flops,
            "token_blocks": self.token_blocks,
            "blocks": self.blocks,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One policy at one size and batch.

    `figures` were measured in every round, `numbers` come from all rounds together (None: too few rounds); both by
    dotted names.
    """

    policy: str
    fingerprint: str
    figures: Mapping[str, Spread]
    numbers: Mapping[str, float | None]
    scales: tuple[ScaleFigures, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; dotted names become nested objects."""
        figures = {name: spread.to_json() for name, spread in self.figures.items()}
        found: dict[str, Any] = {
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            **_nested({**figures, **self.numbers}),
        }
        return {**found, "scales": [scale.to_json() for scale in self.scales]} if self.scales else found


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size and batch; the first entry is the baseline of the ratios of all others."""

    picture: Picture
    batch: int
    rounds: int
    entries: tuple[Entry, ...]

    @property
    def title(self) -> str:
        """Size and batch for people."""
        return f"{self.picture.width}x{self.picture.height}, batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self.picture),
            "batch": self.batch,
            "rounds": self.rounds,
            "policies": [entry.to_json() for entry in self.entries],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """A whole measurement.

    `weights_bytes` by part; `method` says how the figures came about, `excluded` what is in none of them; `stopped` why
    rounds are missing, None if all are there.
    """

    kind: str
    command: str
    machine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    peak: MatmulPeak | None
    weights_bytes: Mapping[str, int]
    cases: tuple[Case, ...]
    method: tuple[str, ...]
    excluded: tuple[str, ...]
    stopped: Stop | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "bench": self.kind,
            "command": self.command,
            "machine": self.machine,
            "model": self.model,
            "settings": self.settings,
            "matmul_peak": None if self.peak is None else self.peak.to_json(),
            "weights_bytes": dict(self.weights_bytes),
            "cases": [case.to_json() for case in self.cases],
            "method": list(self.method),
            "excluded": list(self.excluded),
            "stopped": None if self.stopped is None else str(self.stopped),
        }

    def to_csv(self) -> str:
        """One line per figure; p10 and p90 are empty where a number comes from all rounds together.

        `side` counts the policies from 0, the baseline, as one policy may stand in a measurement twice.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for case in self.cases:
            for side, entry in enumerate(case.entries):
                spreads = {**entry.figures, **{f"scale_ms.{scale.scale}": scale.ms for scale in entry.scales}}
                lines: list[tuple[str, object, object, object]] = [
                    (name, spread.median, spread.p10, spread.p90) for name, spread in spreads.items()
                ]
                lines += [(name, "" if value is None else value, "", "") for name, value in entry.numbers.items()]
                place = (case.picture.width, case.picture.height, case.batch, side, entry.policy)
                writer.writerows((*place, *line, case.rounds) for line in lines)
        return text.getvalue()


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names such as `ms.total` as objects in objects."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, rest = name.partition(".")
        if rest:
            found.setdefault(group, {})[rest] = value
        else:
            found[group] = value
    return found
