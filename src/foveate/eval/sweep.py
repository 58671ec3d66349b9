"""A policy at many settings, all in one comparison, and the frontier that they draw."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.eval.compare import compare_policies, read_prompts, refuse_without_extra
from foveate.eval.judges import Judge
from foveate.eval.measure import Setup
from foveate.eval.over import Setting, grid, read_overs
from foveate.eval.report import ComparisonReport, PolicyResult
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from foveate.viz.page_data import Cell, Lead, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SweepReport:
    """What a sweep found.

    Attributes:
        policy: Spec that the fields were changed in.
        settings: Values of the fields, by the policy's spec with them.
        comparison: Every setting beside the reference.
    """

    policy: str
    settings: Mapping[str, Mapping[str, str]]
    comparison: ComparisonReport

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data, with the values of the fields at every policy."""
        data = self.comparison.to_json()
        entries = [{**entry, "settings": dict(self.settings[entry["policy"]])} for entry in data["policies"]]
        return {**data, "policies": entries, "sweep": {"policy": self.policy, "fields": self._fields()}}

    def to_csv(self) -> str:
        """The figures of every setting and control."""
        return self.comparison.to_csv()

    def page(self, command: str = "") -> str:
        """The comparison as one self-contained HTML page, the settings on top."""
        fields = self._fields()
        figures = {result.policy: result for result in self.comparison.policies}
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (*(values[name] for name in fields), *_cells(figures[spec])) for spec, values in self.settings.items()
        )
        columns = (*fields, "speedup", "FLOPs", "PSNR dB", "PSNR p10", "SSIM", "FLIP")
        table = Table(caption=f"Settings of {self.policy}", columns=columns, rows=rows)
        lead = Lead(heading="Sweep", text=f"{len(rows)} settings.", tables=(table,))
        return self.comparison.page(command, lead, f"{self.policy} over {', '.join(fields)}")

    def to_html(self, path: str | Path, command: str = "") -> Path:
        """Writes the page; returns its path."""
        with replace_file(path) as partial:
            partial.write_text(self.page(command), encoding="utf-8")
        return Path(path)

    def plot(self, path: str | Path) -> Path:
        """Draws the frontier, PSNR against measured speedup, as png, svg or pdf; returns its path.

        Raises:
            FoveateError: matplotlib is missing, or another ending.
        """
        require_plot(Path(path))
        with replace_file(path) as partial:
            draw_frontier(self.comparison, partial, Path(path).suffix.lstrip("."))
        return Path(path)

    def _fields(self) -> tuple[str, ...]:
        return tuple(next(iter(self.settings.values())))


def sweep(  # noqa: PLR0913 - as `compare`
    pipe: Pipeline,
    policy: str | Path | Policy,
    over: Sequence[str] | Mapping[str, Sequence[object]],
    prompts: str | Path | Sequence[str],
    seeds: int = 1,
    against: str | Path | Policy = "full",
    *,
    controls: bool = False,
    runs: int = 3,
    first_seed: int = 0,
    batch_size: int = 1,
    options: Options | None = None,
    judges: Sequence[Judge] = (),
    store: str | Path | None = None,
    hides_progress: bool | None = None,
) -> SweepReport:
    """Compares a policy at every combination of some fields' values.

    Args:
        pipe: The model.
        policy: What the fields belong to.
        over: Texts such as `count=1..3`, `keep_ratio=0.3..0.9:0.1` or `fill=base,zero`, or fields and their values.
        prompts: As those below, as in `foveate.compare`.
        seeds: See there.
        against: See there.
        controls: See there.
        runs: See there.
        first_seed: See there.
        batch_size: See there.
        options: See there.
        judges: See there.
        store: See there.
        hides_progress: See there.

    Raises:
        FoveateError: A field or value that the policy does not have, and what `compare` refuses.
    """
    refuse_without_extra()
    base = load_policy(policy)
    setup = Setup(
        prompts=tuple(read_prompts(prompts)),
        seeds=seeds,
        first_seed=first_seed,
        against=load_policy(against),
        runs=runs,
        batch_size=batch_size,
        options=options or {},
        judges=tuple(judges),
    )
    place = None if store is None else Path(store)
    settings = grid(base, read_overs(over))
    return sweep_settings(pipe, base, settings, setup, place, has_controls=controls, hides_progress=hides_progress)


def sweep_settings(
    pipe: Pipeline,
    base: Policy,
    settings: Sequence[Setting],
    setup: Setup,
    folder: Path | None,
    *,
    has_controls: bool = False,
    hides_progress: bool | None = None,
) -> SweepReport:
    """`sweep` with everything read and checked."""
    policies = [setting.policy for setting in settings]
    comparison = compare_policies(
        pipe, policies, setup, folder, has_controls=has_controls, hides_progress=hides_progress
    )
    return SweepReport(
        policy=base.spec,
        settings={setting.policy.spec: setting.values for setting in settings},
        comparison=comparison,
    )


def require_plot(path: Path) -> None:
    """Refuses a plot that could not be drawn.

    Raises:
        FoveateError: matplotlib is missing, or the ending is none of its.
    """
    from importlib.util import find_spec  # noqa: PLC0415

    if path.suffix.lower() not in PLOTS:
        raise FoveateError(f"a plot ends with {', '.join(PLOTS)}, got {path}")
    if find_spec("matplotlib") is None:
        raise FoveateError('a plot needs matplotlib, which is not installed: pip install "foveate[eval]"')


def draw_frontier(report: ComparisonReport, path: Path, form: str) -> None:
    """PSNR against measured speedup of the transformer: one line per method, controls dashed, bars are intervals.

    Settings that change no byte of any image are left out, as their 100 dB would press everything else together.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `eval`

    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    for results, is_control in ((report.policies, False), (report.controls, True)):
        changing = [result for result in results if result.fidelity.identical < result.fidelity.num_images]
        for name in dict.fromkeys(_method(result) for result in changing):
            _draw_method(axis, [r for r in changing if _method(r) == name], name, is_control=is_control)
    axis.axhline(report.yardstick_psnr, color="grey", lw=1, ls=":", label="another seed")
    axis.plot([1.0], [report.yardstick_psnr], "*", color="grey", ms=9)
    axis.set_xlabel(f"measured speedup of the transformer against {report.against}")
    axis.set_ylabel("PSNR, mean over images, dB")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format=form)


def _draw_method(axis: "Axes", results: Iterable[PolicyResult], name: str, *, is_control: bool) -> None:
    points = sorted(
        (r.timing.speedup.transformer, r.fidelity.psnr.mean, r.fidelity.intervals["psnr.mean"]) for r in results
    )
    x, y = [p[0] for p in points], [p[1] for p in points]
    ends = [(0.0, 0.0) if p[2] is None else (max(p[1] - p[2].low, 0.0), max(p[2].high - p[1], 0.0)) for p in points]
    style = "o--" if is_control else "s-"
    axis.errorbar(x, y, yerr=list(zip(*ends, strict=True)), fmt=style, label=name, lw=1.2, ms=4, capsize=2, alpha=0.85)


def _method(result: PolicyResult) -> str:
    """The names of a policy's parts, without their settings."""
    return " | ".join(part.partition(":")[0] for part in result.policy.split("|"))


def _cells(result: PolicyResult) -> tuple[float, ...]:
    found = result.fidelity
    return (
        result.timing.speedup.transformer, result.flops_ratio, found.psnr.mean, found.psnr.p10, found.ssim.mean,
        found.flip.mean,
    )  # fmt: skip
