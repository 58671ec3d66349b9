"""What a comparison of two runs found: figures, JSON, CSV, a table, a page, and whether bounds hold."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.bulk.pairing import SIDES, Counts
from foveate.bulk.scores import Scores
from foveate.core.errors import FoveateError
from foveate.core.setting_changes import setting_changes
from foveate.eval.bounds import FIGURES, FigureBound, figures_of
from foveate.eval.judges import Judge
from foveate.eval.page import fidelity_figures, judged_metrics, shown_pair
from foveate.eval.pairs import FidelityReport
from foveate.eval.report import ShownImage, fidelity_cells, flat_figures
from foveate.viz.metrics import Axis, Metric
from foveate.viz.page import render
from foveate.viz.page_data import Cell, Figure, FrontierPoint, Lead, PageData, Role, Table

NAMES = ("policy", "policy_fingerprint", "model", "weights_sha256", "format")
"""Fields of entries that a report names."""

MOST_NAMES = 5
"""Values of such a field that a report names."""

_NOT_HERE = ("speedup", "latency_ms", "transformer_ms", "beats_controls_by_db", "yardstick_psnr", "runs")
_FIGURES = tuple(name for name in FIGURES if name.split(".")[0] not in _NOT_HERE)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunSide:
    """One of two runs.

    Attributes:
        folder: Where it is.
        config: Of its run.json.
        flops_ratio: Run over full, of all its images that have a partner.
        names: What their entries say, by `NAMES`; up to `MOST_NAMES` values each, and one more where there are more.
        scores: What a scorer said of it.
        judged: Its images beside the reference's; of a reference without judges None.
    """

    folder: Path
    config: Mapping[str, Any]
    flops_ratio: float
    names: Mapping[str, tuple[str, ...]]
    scores: Scores | None
    judged: FidelityReport | None

    @property
    def policy(self) -> str:
        """Spec of its policy, or how many it has."""
        return self.told("policy")

    @property
    def label(self) -> str:
        """What tables call it: its folder and policy, at most."""
        return f"{self.folder.absolute().name} ({self.policy})"

    def told(self, name: str) -> str:
        """The values of a field, in few words."""
        found = self.names[name]
        if len(found) > MOST_NAMES:
            return f"more than {MOST_NAMES} {name.replace('_', ' ')} values"
        return ", ".join(found)

    def figures(self, judges: Sequence[str]) -> dict[str, float]:
        """What is known of the run itself: FLOPs, judges and scorers."""
        judged = {} if self.judged is None else self.judged.to_json()
        found = dict(flat_figures({name: judged[name] for name in judges if name in judged}))
        for name, ends in judged.get("intervals", {}).items():
            if ends is not None and name.split(".")[0] in judges:
                found |= {f"{name}.low": ends[0], f"{name}.high": ends[1]}
        scored = {} if self.scores is None else self.scores.figures()
        return {"flops_ratio": self.flops_ratio, **found, **scored}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunsReport:
    """What a comparison of two runs found.

    Attributes:
        reference: The run that the other one is held against.
        other: The run in question.
        fidelity: Of the other run's images to those of the reference.
        counts: What could be compared, and what not.
        shown: The worst pairs, for the page.
        is_interrupted: Whether Ctrl-C ended it early.
    """

    reference: RunSide
    other: RunSide
    fidelity: FidelityReport
    counts: Counts
    shown: tuple[ShownImage, ...]
    is_interrupted: bool

    def sides(self) -> tuple[tuple[RunSide, Role], tuple[RunSide, Role]]:
        """The run in question, then the reference."""
        return (self.other, Role.POLICY), (self.reference, Role.REFERENCE)

    def to_json(self) -> dict[str, Any]:
        """Plain data in the keys that every JSON output of this library uses."""
        return {
            **self.fidelity.to_json(),
            **_own_json(self.other, ()),
            "reference": _own_json(self.reference, tuple(self.fidelity.judged)),
            "pairing": asdict(self.counts),
            "notes": list(self.notes()),
            "config": {side: dict(run.config) for side, run in zip(SIDES, (self.reference, self.other), strict=True)},
        }

    def figures(self) -> dict[str, float]:
        """Every number that a bound can be about, by its dotted name."""
        found = self.fidelity.to_json()
        intervals = found.pop("intervals")
        figures = dict(flat_figures(found))
        for name, ends in intervals.items():
            if ends is not None:
                figures |= {f"{name}.low": ends[0], f"{name}.high": ends[1]}
        return {**figures, **self.other.figures(tuple(self.fidelity.judged))}

    def holding(self, bound: FigureBound) -> tuple[tuple[str, float], ...]:
        """The run in question and its figure, where a bound holds for it."""
        figures = self.figures()
        return ((self.other.label, bound.value(figures)),) if bound.holds(figures) else ()

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows for people."""
        judges = tuple(self.fidelity.judged)
        scores = tuple(name for name in self._scored() if name.count(".") == 1)
        fidelity = ("PSNR dB", "p10", "min", "foreground", "SSIM", "MS-SSIM", "FLIP")
        columns = ("run", "FLOPs", *fidelity, *judges, "identical", *scores)
        own = self.reference.figures(judges)
        still = ["-"] * len(fidelity) + [_cell(own, f"{name}.mean") for name in judges] + ["-"]
        rows = []
        for side, cells in ((self.other, fidelity_cells(self.fidelity, judges)), (self.reference, still)):
            figures = side.figures(judges)
            told = side.label if side is self.other else f"{side.label} (reference)"
            rows.append((told, f"{side.flops_ratio:.1%}", *cells, *(_cell(figures, name) for name in scores)))
        return columns, rows

    def to_csv(self) -> str:
        """One line per run, one column per figure; empty where a figure is not known."""
        judges = tuple(self.fidelity.judged)
        figures = {id(self.other): self.figures(), id(self.reference): self.reference.figures(judges)}
        known = {name: None for found in figures.values() for name in found}
        columns = [name for name in _FIGURES if name in known] + [name for name in known if name not in _FIGURES]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "policy", "role", "fingerprint", *columns])
        for side, role in self.sides():
            found = figures[id(side)]
            values = ["" if name not in found else f"{found[name]:.10g}" for name in columns]
            names = side.told("policy"), role.value, side.told("policy_fingerprint")
            writer.writerow([str(side.folder), *names, *values])
        return file.getvalue()

    def notes(self) -> Iterator[str]:
        """What a reader should know before trusting a figure, one line each."""
        counts = self.counts
        if self.is_interrupted:
            yield f"interrupted: figures are of the first {self.fidelity.num_images} pairs"
        for side, run in zip(SIDES, (self.reference, self.other), strict=True):
            missing = {
                "rows are only there": counts.only[side],
                "failures in rows of both": counts.failed[side],
                "images have no partner": counts.unpaired[side],
            }
            told = ", ".join(f"{number} {what}" for what, number in missing.items() if number)
            if told:
                yield f"{run.folder}: {told}; they are in no figure"
        if counts.other_prompts or counts.other_sizes:
            yield (
                f"left out: {counts.other_prompts} pairs of other prompts, {counts.other_sizes} pairs of other sizes"
            )
        if counts.other_seeds:
            yield (
                f"{counts.other_seeds} of {counts.pairs} pairs have other seeds: PSNR, SSIM and FLIP compare different "
                "draws there"
            )
        yield from self._notes_on_images()
        changes = setting_changes(self.reference.config, self.other.config)
        if changes:
            yield f"settings of the reference and of the other run: {changes}"

    def page(self, command: str = "") -> str:
        """The report as one self-contained HTML page.

        Args:
            command: What to type to get this again.
        """
        has_one_seed = not self.counts.other_seeds
        config = {side: dict(run.config) for side, run in zip(SIDES, (self.reference, self.other), strict=True)}
        data = PageData(
            title=f"{self.other.label} against {self._reference_name()}",
            summary=f"{self.fidelity.num_images} pairs of images of two runs, {self.other.told('model')}",
            points=tuple(self._points()),
            headline=self.other.label,
            pairs=tuple(shown_pair(self.other.label, shown) for shown in self.shown),
            facts={f"{name} of the {side}": told for side, name, told in self._facts()},
            command=command,
            config=config,
            notes=tuple(self.notes()),
            lead=self._lead(),
            num_pairs=self.fidelity.num_images,
            metrics={**judged_metrics(self.fidelity.judged), **self._metrics()},
            pairing="The same prompt, seed and random numbers on both sides."
            if has_one_seed
            else "The same prompt on both sides, of some pairs with different seeds.",
        )
        return render(data)

    def _facts(self) -> Iterator[tuple[str, str, str]]:
        for side, run in zip(SIDES, (self.reference, self.other), strict=True):
            for name in NAMES:
                yield f"{side} run", name.replace("_", " "), run.told(name)

    def _notes_on_images(self) -> Iterator[str]:
        found = self.fidelity
        if found.constant_images:
            yield f"{self.other.label}: {found.constant_images} of {found.num_images} images have one colour"
        if found.constant_references:
            yield f"{found.constant_references} references have one colour; their pairs are not scored"
        for side, _ in self.sides():
            encoder = side.config.get("encoder")
            if "jpeg" in side.names["format"] or (isinstance(encoder, dict) and encoder.get("quality") is not None):
                yield f"{side.folder} holds lossy {side.told('format')}: figures include what that loses"
        if self.reference.names["weights_sha256"] != self.other.names["weights_sha256"]:
            yield "the runs are of different weights: figures compare models, not only policies"

    def _scored(self) -> dict[str, str]:
        """Labels of the scorers' figures by name."""
        found: dict[str, str] = {}
        for side, _ in self.sides():
            found |= {} if side.scores is None else side.scores.labels()
        return found

    def _metrics(self) -> dict[str, Metric]:
        return {
            name: Metric(name=name, label=label, digits=None, axis=Axis.FIDELITY if name.count(".") == 1 else Axis.NONE)
            for name, label in self._scored().items()
        }

    def _points(self) -> Iterator[FrontierPoint]:
        judges = tuple(self.fidelity.judged)
        for side, role in self.sides():
            own = {name: Figure(value=value) for name, value in side.figures(judges).items()}
            scored = {name: found for name, found in own.items() if name == "flops_ratio" or name in self._scored()}
            judged = {} if side.judged is None else fidelity_figures(side.judged)
            if role is Role.REFERENCE:
                judged = {name: found for name, found in judged.items() if name.split(".")[0] in judges}
            yield FrontierPoint(
                name=side.label if role is Role.POLICY else self._reference_name(),
                role=role,
                figures={**scored, **judged},
                details={"fingerprint": side.told("policy_fingerprint")},
            )

    def _reference_name(self) -> str:
        """Unlike that of the other run, which a page needs."""
        same = self.reference.label == self.other.label
        return f"{self.reference.folder} ({self.reference.policy}), reference" if same else self.reference.label

    def _lead(self) -> Lead | None:
        """Scorers' figures of both runs, side by side."""
        labels = self._scored()
        if not labels:
            return None
        of_reference, of_other = (
            {} if side.scores is None else side.scores.figures() for side in (self.reference, self.other)
        )
        rows: list[tuple[Cell, ...]] = []
        for name, label in labels.items():
            one, other = of_reference.get(name), of_other.get(name)
            change = None if one is None or other is None else other - one
            rows.append((label, one, other, change))
        columns = ("figure", "reference", "run", "change")
        return Lead(
            heading="Scores", tables=(Table(caption="What the scorer said", columns=columns, rows=tuple(rows)),)
        )


def parse_bounds(
    texts: Sequence[str], judges: Sequence[Judge], scores: tuple[Scores, Scores] | None
) -> tuple[FigureBound, ...]:
    """Bounds on the run in question as they were written.

    Raises:
        FoveateError: No bound, no such figure, one that a comparison of runs does not have, or a policy in it.
    """
    scored = () if scores is None else tuple(scores[1].figures())
    found = tuple(FigureBound.parse(text, (*figures_of(judges), *scored)) for text in texts)
    for bound in found:
        if bound.figure.split(".")[0] in _NOT_HERE:
            raise FoveateError(f"{bound.text}: finished runs have no {bound.figure}; there are {', '.join(_FIGURES)}")
        if bound.policy is not None:
            raise FoveateError(f"{bound.text}: bounds are on the second run; leave the policy out")
    return found


def _own_json(side: RunSide, judges: Sequence[str]) -> dict[str, Any]:
    """What is known of a run itself, and what these judges say of it."""
    found: dict[str, Any] = {}
    if side.judged is not None and judges:
        judged = side.judged.to_json()
        ends = {name: ends for name, ends in judged["intervals"].items() if name.split(".")[0] in judges}
        found = {**{name: judged[name] for name in judges}, "intervals": ends}
    if side.scores is not None:
        categories = {name: dict(values) for name, values in side.scores.categories.items()}
        found["scores"] = {
            "scorer": side.scores.scorer,
            "overall": dict(side.scores.overall),
            "categories": categories,
        }
    names = {name: list(side.names[name]) for name in NAMES}
    return {"run": str(side.folder), **names, "flops_ratio": side.flops_ratio, **found}


def _cell(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.3g}" if name in figures else "-"
