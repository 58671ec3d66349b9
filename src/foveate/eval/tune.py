"""Finds the best setting of a policy that holds bounds, and proves it on prompts that did not choose it.

Trials run on tuning prompts, chosen by optuna: every setting where there are no more of them than trials, else by its
tree-structured Parzen estimator with the bounds as constraints. The best settings that hold the bounds there are then
measured in turns on held-out prompts. A setting wins only if the pessimistic end of its bootstrap interval holds every
bound; the confidence is shared by the settings that are judged (Bonferroni), as the best of several looks better than
it is.

Milliseconds are those of the first trial's reference over the measured ratio, as a machine drifts between trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.eval.bounds import FigureBound, figures_of
from foveate.eval.compare import compare_policies, read_prompts, refuse_without_extra
from foveate.eval.judges import Judge
from foveate.eval.measure import Setup
from foveate.eval.over import Over, read_overs, with_values
from foveate.eval.report import ComparisonReport, PolicyResult
from foveate.eval.statistics import interval
from foveate.eval.store import check_store, open_store
from foveate.eval.study import Study, Trial, open_study
from foveate.eval.tune_report import Candidate, Goal, TuneReport
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy

NUM_CANDIDATES = 3
"""Settings that held-out prompts judge."""
_RISK = 0.05
"""That a bound is said to hold and does not, over all of them."""
_DRIFTING = {"latency_ms.median": "end_to_end", "transformer_ms.median": "transformer"}
"""Figures that a machine's drift moves, and the ratio that it does not."""
_FEW = 30
"""Held-out prompts below which a percentile's interval is rough."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tuning:
    """Everything that a tuning is told.

    Attributes:
        base: Policy whose fields change.
        overs: The fields.
        goal: What is sought.
        tuning: What trials generate.
        held_out: What candidates generate.
        trials: How many settings are tried at most.
        has_controls: Whether controls run beside the candidates.
    """

    base: Policy
    overs: tuple[Over, ...]
    goal: Goal
    tuning: Setup
    held_out: Setup
    trials: int
    has_controls: bool = False

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise FoveateError(f"trials must be 1 or more, got {self.trials}")
        if len(self.held_out.prompts) < 2:  # noqa: PLR2004 - as the message says
            raise FoveateError("a bound is proved on two held-out prompts or more; give more prompts")
        shared = set(self.tuning.prompts) & set(self.held_out.prompts)
        if shared:
            raise FoveateError(
                f"{len(shared)} prompts are in both sets, such as {min(shared)!r}; held-out ones are others"
            )

    def config(self) -> dict[str, Any]:
        """What a study goes on with, as plain data."""
        overs = {one.field: list(one.values) or [str(one.low), str(one.high)] for one in self.overs}
        # Optuna keeps the choices of a list and the numbers of a range in different ways.
        ranges = {one.field: None if one.low is None else f"{one.low}..{one.high}" for one in self.overs}
        return {"kind": "study", "policy": self.base.spec, "over": overs, "ranges": ranges, **self.goal.to_json()}


def tune(  # noqa: PLR0913 - what is sought, where, and how it is measured
    pipe: Pipeline,
    policy: str | Path | Policy,
    over: Sequence[str] | Mapping[str, Sequence[object]],
    prompts: str | Path | Sequence[str],
    *,
    subject_to: str | Sequence[str],
    minimize: str | None = None,
    maximize: str | None = None,
    held_out: str | Path | Sequence[str] | None = None,
    trials: int = 20,
    store: str | Path,
    seeds: int = 1,
    against: str | Path | Policy = "full",
    controls: bool = False,
    runs: int = 1,
    first_seed: int = 0,
    batch_size: int = 1,
    options: Options | None = None,
    judges: Sequence[Judge] = (),
    hides_progress: bool | None = None,
) -> TuneReport:
    """Finds the best setting of a policy that holds bounds on held-out prompts.

    Args:
        pipe: The model.
        policy: What the fields belong to.
        over: Texts such as `count=1..3` or `keep_ratio=0.3..0.9`, or fields and their values.
        prompts: Texts, or a file with one prompt a line. Without `held_out` every second one is held out.
        subject_to: Bounds such as `psnr.p10 >= 27`.
        minimize: Figure that shall be small; `latency_ms.median` without `maximize`.
        maximize: Figure that shall be large, instead.
        held_out: Prompts that only judge, none of them in `prompts`.
        trials: Settings that are tried at most.
        store: Folder of the study: trials and every measurement. The same call goes on there; one process at a time.
        seeds: As in `foveate.compare`, as is everything below.
        against: See there.
        controls: Whether controls are measured beside the candidates on the held-out prompts.
        runs: See there.
        first_seed: See there.
        batch_size: See there.
        options: See there.
        judges: See there.
        hides_progress: See there.

    Raises:
        FoveateError: An unknown figure or field, no held-out prompts, a store of another study or in use, and what
            `compare` refuses.
    """
    refuse_without_extra()
    tuning_prompts, held_out_prompts = split_prompts(
        read_prompts(prompts), None if held_out is None else read_prompts(held_out)
    )
    setup = Setup(
        prompts=tuple(tuning_prompts),
        seeds=seeds,
        first_seed=first_seed,
        against=load_policy(against),
        runs=runs,
        batch_size=batch_size,
        options=options or {},
        judges=tuple(judges),
    )
    bounds = [subject_to] if isinstance(subject_to, str) else list(subject_to)
    told = Tuning(
        base=load_policy(policy),
        overs=read_overs(over),
        goal=read_goal(minimize, maximize, bounds, judges),
        tuning=setup,
        held_out=replace(setup, prompts=tuple(held_out_prompts)),
        trials=trials,
        has_controls=controls,
    )
    return run_tuning(pipe, told, Path(store), hides_progress=hides_progress)


def split_prompts(prompts: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Prompts that choose and prompts that judge; without prompts of their own every second one judges."""
    unique = list(dict.fromkeys(prompts))
    return (unique[0::2], unique[1::2]) if held_out is None else (unique, list(dict.fromkeys(held_out)))


def read_goal(
    minimize: str | None, maximize: str | None, subject_to: Sequence[str], judges: Sequence[Judge] = ()
) -> Goal:
    """What is sought.

    Raises:
        FoveateError: Both figures, an unknown one, or a bound that is none.
    """
    if minimize is not None and maximize is not None:
        raise FoveateError("tune takes one figure to minimize or to maximize, got both")
    judged = figures_of(judges)
    # Read as a bound, whose figures are checked.
    figure = FigureBound.parse(f"{maximize or minimize or 'latency_ms.median'} >= 0", judged).figure
    if figure == "beats_controls_by_db":
        raise FoveateError("trials run without controls; seek another figure than beats_controls_by_db")
    bounds = tuple(FigureBound.parse(text, judged) for text in subject_to)
    return Goal(figure=figure, is_maximised=maximize is not None, bounds=bounds)


def run_tuning(pipe: Pipeline, told: Tuning, folder: Path, *, hides_progress: bool | None = None) -> TuneReport:
    """`tune` with everything read and checked."""
    spec, model = pipe.model.spec, pipe.model
    with open_store(folder, {**told.config(), "model": spec.name}):
        check_store(folder / "held-out", told.held_out.config(spec, model))
        study = open_study(folder / "study.journal", told.overs, told.trials, is_maximised=told.goal.is_maximised)
        _run_trials(pipe, told, study, folder / "tuning", hides_progress)
        trials = study.trials()
        best = _best(trials, told.goal)
        report = None
        if best:
            report = compare_policies(
                pipe,
                [load_policy(trial.policy) for trial in best],
                told.held_out,
                folder / "held-out",
                has_controls=told.has_controls,
                hides_progress=hides_progress,
            )
            if report.is_interrupted:
                raise KeyboardInterrupt
        return _conclude(pipe, told, trials, report)


def _run_trials(pipe: Pipeline, told: Tuning, study: Study, folder: Path, hides_progress: bool | None) -> None:
    """Tries settings until there are enough; a trial that Ctrl-C ended is tried again by the next run."""
    model = pipe.model
    schedule, shape = told.tuning.job(model.spec).schedule, model.transformer.shape

    def attempt(values: Mapping[str, str]) -> Trial:
        try:
            policy = with_values(told.base, values)
            policy.bind(schedule, shape)
        except FoveateError as error:
            return Trial(values=values, policy="", value=None, violations={}, refusal=str(error), figures={})
        report = compare_policies(pipe, [policy], told.tuning, folder, hides_progress=True)
        if report.is_interrupted:
            raise KeyboardInterrupt
        return _judged(values, policy, report.figures(), told.goal, study)

    with tqdm(total=study.wanted, initial=study.done, disable=hides_progress, unit="trial", leave=False) as bar:
        while study.done < study.wanted:
            study.step(attempt)
            bar.update()
            bar.set_description(study.state())


def _judged(values: Mapping[str, str], policy: Policy, figures: Mapping[str, float], goal: Goal, study: Study) -> Trial:
    """A setting that ran: what it measured, and by how much it breaks the bounds."""
    drift = _DRIFTING.get(goal.figure)
    value = FigureBound(text="", policy=None, figure=goal.figure, comparison=">", limit=0.0).value(figures)
    if drift is not None:
        value = study.reference_ms(figures[goal.figure] * figures[f"speedup.{drift}"]) / figures[f"speedup.{drift}"]
    violations = {bound.text: bound.violation(figures) for bound in goal.bounds}
    return Trial(values=values, policy=policy.spec, value=value, violations=violations, refusal=None, figures=figures)


def _best(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """The best settings that hold the bounds on the tuning prompts, each policy once."""
    holding = {trial.policy: trial for trial in trials if trial.is_feasible}
    ordered = sorted(holding.values(), key=lambda trial: trial.value or 0.0, reverse=goal.is_maximised)
    return ordered[:NUM_CANDIDATES]


def _conclude(pipe: Pipeline, told: Tuning, trials: Sequence[Trial], report: ComparisonReport | None) -> TuneReport:
    results = () if report is None else report.policies
    # Two-sided intervals of which one side decides, once per candidate and bound.
    tests = max(len(results) * len(told.goal.bounds), 1)
    level = 1 - 2 * _RISK / tests
    found = [_candidate(result, told, report, level) for result in results if report is not None]
    candidates = sorted(found, key=lambda candidate: candidate.value, reverse=told.goal.is_maximised)
    winning = next((candidate for candidate in candidates if candidate.holds), None)
    return TuneReport(
        base=told.base.spec,
        goal=told.goal,
        trials=tuple(trials),
        candidates=tuple(candidates),
        winner=None if winning is None else load_policy(winning.policy),
        held_out=report,
        confidence=1 - _RISK / tests,
        num_tuning=len(told.tuning.prompts),
        config=told.tuning.config(pipe.model.spec, pipe.model)["generation"],
    )


def _candidate(result: PolicyResult, told: Tuning, report: ComparisonReport, level: float) -> Candidate:
    figures = report.figures(result.policy)
    ends = {
        bound.text: _pessimistic(result, bound, figures, len(told.held_out.prompts), level)
        for bound in told.goal.bounds
    }
    holds = all(bound.holds({bound.figure: ends[bound.text]}) for bound in told.goal.bounds)
    unproved = tuple(bound.text for bound in told.goal.bounds if not _is_of_images(result, bound))
    return Candidate(policy=result.policy, value=figures[told.goal.figure], ends=ends, unproved=unproved, holds=holds)


def _is_of_images(result: PolicyResult, bound: FigureBound) -> bool:
    """Whether a figure has an interval over prompts."""
    return bound.figure.partition(".")[0] in result.fidelity.summaries()


def _pessimistic(
    result: PolicyResult, bound: FigureBound, figures: Mapping[str, float], num_prompts: int, level: float
) -> float:
    """The end of a figure's interval that is worse for its bound; figures of no image stand as they were measured."""
    name, _, part = bound.figure.partition(".")
    if not _is_of_images(result, bound):
        return bound.value(figures)
    values = [row.scores.value(name) for row in result.rows]
    ends = interval(values, num_prompts, part, level)
    if ends is None:
        raise FoveateError(f"{bound.text} cannot be proved: fewer than two held-out prompts could be scored")
    return ends.low if bound.comparison in (">", ">=") else ends.high


def few_prompts(num_prompts: int) -> str | None:
    """A warning where an interval of a percentile rests on few prompts."""
    if num_prompts >= _FEW:
        return None
    return f"{num_prompts} held-out prompts: an interval of a percentile is rough below {_FEW}"
