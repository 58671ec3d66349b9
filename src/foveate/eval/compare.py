"""Policies against a reference, mostly the full run: how much faster, how alike, how many FLOPs; from one process.

All run in turns (`eval.measure`) after a warm-up. Images have the same keyed randomness. The yardstick is the full run
with another seed: a policy below it changes an image as much as a new seed does.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.core.prompt_file import read_prompt_file
from foveate.eval.controls import ANOTHER_SEED, Contest, beats, valid_controls
from foveate.eval.fidelity import missing_extra
from foveate.eval.judges import Judge
from foveate.eval.measure import Readings, Setup, Side, Sides, complete_batches, measure, num_sessions, read
from foveate.eval.pairs import FidelityReport, fidelity
from foveate.eval.report import ComparisonReport, ImageRow, PolicyResult, Reference, ShownImage, Speedup, Timing
from foveate.eval.statistics import interval, spread
from foveate.eval.store import Store, open_store
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from foveate.viz.page_data import Role

MOST_SHOWN = 32
"""Images of a policy that a report keeps for its page, the worst ones."""

_PARTS = {"transformer": "transformer", "decoder": "decoder", "end_to_end": "total"}


def compare(  # noqa: PLR0913 - what is generated, how it is judged, and how it is timed
    pipe: Pipeline,
    policy: str | Path | Policy | Sequence[str | Path | Policy],
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
) -> ComparisonReport:
    """Compares any number of policies with a reference, on the same prompts and seeds.

    Args:
        pipe: The model.
        policy: What is judged, one policy or several.
        prompts: Texts, or a file with one prompt a line.
        seeds: Images per prompt, from `first_seed` on.
        against: The reference.
        controls: Whether trivial baselines run in the same turns, so that the report says by how much they are beaten.
        runs: How often every batch is timed, at least once.
        first_seed: Of every prompt.
        batch_size: Images generated as one call at most (never less than one prompt's images). Ratios of time are
            formed per call.
        options: Other options of every call, such as width and height or guidance_scale; a negative prompt is one text.
        judges: Who else scores every image.
        store: Folder that keeps every measurement; the same call goes on there after an interruption, and more policies
            or runs may be added. None keeps them until the report is made.
        hides_progress: False shows progress and the time left on stderr, True hides it, None shows it only where that
            is a terminal.

    Returns:
        Figures of every policy; after Ctrl-C those of the prompts that were complete, and `is_interrupted` says so.

    Raises:
        FoveateError: No prompts, an option that the comparison sets itself, fewer than one run or seed, flip-evaluator
            is missing, a store of other settings, or what the pipeline refuses.
        KeyboardInterrupt: Ctrl-C before the first prompt was complete.
    """
    refuse_without_extra()
    several = [policy] if isinstance(policy, str | Path | Policy) else list(policy)
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
    policies = [load_policy(one) for one in several]
    return compare_policies(pipe, policies, setup, place, has_controls=controls, hides_progress=hides_progress)


def compare_policies(
    pipe: Pipeline,
    policies: Sequence[Policy],
    setup: Setup,
    folder: Path | None,
    *,
    has_controls: bool = False,
    hides_progress: bool | None = None,
) -> ComparisonReport:
    """`compare` with everything read and checked."""
    if not policies:
        raise FoveateError("a comparison needs at least one policy, got none")
    spec, model = pipe.model.spec, pipe.model
    schedule = setup.job(spec).schedule
    rivals = valid_controls(schedule, model.transformer.shape, model.dtype) if has_controls else []
    sides = Sides.of([*policies, *rivals], setup)
    config = setup.config(spec, model)
    with _store(folder, config) as store:
        is_interrupted = not measure(pipe, sides, setup, store, hides_progress=hides_progress)
        batches = complete_batches(sides, setup, store)
        if not batches:
            raise KeyboardInterrupt
        report = _Reader(setup=setup, sides=sides, store=store, batches=batches).report(
            {policy.fingerprint for policy in policies}, {policy.fingerprint for policy in rivals}, config["generation"]
        )
        return replace(report, is_interrupted=is_interrupted)


def refuse_without_extra() -> None:
    """Refuses what is missing before anything is loaded or generated.

    Raises:
        FoveateError: flip-evaluator is not installed.
    """
    if find_spec("flip_evaluator") is None:
        raise FoveateError(missing_extra("a comparison", "flip-evaluator"))


def read_prompts(prompts: str | Path | Sequence[str]) -> list[str]:
    """Texts as given, or the lines of a file that are not empty.

    Raises:
        FoveateError: The file cannot be read, or there is no prompt.
    """
    texts = read_prompt_file(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    if not texts:
        raise FoveateError("a comparison needs at least one prompt, got none")
    return texts


@contextmanager
def _store(folder: Path | None, config: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a folder, or one that goes when the report is made."""
    if folder is not None:
        with open_store(folder, config) as store:
            yield store
        return
    with tempfile.TemporaryDirectory(prefix="foveate-") as name, open_store(Path(name) / "store", config) as store:
        yield store


class _Reader:
    """Makes a report of what a store has."""

    def __init__(self, *, setup: Setup, sides: Sides, store: Store, batches: Sequence[int]) -> None:
        self.setup, self.sides, self.store = setup, sides, store
        self.batches = tuple(batches)
        self.prompts = [prompt for batch in self.batches for prompt in setup.batches[batch]]
        self.errors = [judge.name for judge in setup.judges if judge.is_error]
        self.sessions = num_sessions(store, sides, self.batches)

    def report(self, asked: set[str], rivals: set[str], config: Mapping[str, Any]) -> ComparisonReport:
        """Everything; by fingerprint, `asked` are the policies in question and `rivals` the settings of controls."""
        reference = self._read(self.sides.reference)
        yardstick = self._fidelity(self._read(self.sides.other_seed))
        results = [self._result(side, asked) for side in self.sides.policies]
        if rivals:
            results = self._with_beats(results, rivals, reference)
        return ComparisonReport(
            policies=tuple(result for result in results if result.role is Role.POLICY),
            controls=tuple(result for result in results if result.role is Role.CONTROL),
            reference=Reference(
                policy=self.setup.against.spec,
                timing=self._timing(reference),
                flops_ratio=reference.flops_ratio,
                judged=self._fidelity(reference) if reference.pairs else None,
            ),
            yardstick=yardstick,
            config=config,
            sessions=self.sessions,
            missing_prompts=len(self.setup.prompts) - len(self.prompts),
            is_interrupted=False,
        )

    def _read(self, side: Side) -> Readings:
        return read(self.store, side, self.sides.reference, self.batches)

    def _fidelity(self, readings: Readings) -> FidelityReport:
        return fidelity(readings.pairs, len(self.prompts), self.errors)

    def _result(self, side: Side, asked: set[str]) -> PolicyResult:
        readings = self._read(side)
        seeds = range(self.setup.first_seed, self.setup.first_seed + self.setup.seeds)
        names = [(prompt, seed) for prompt in self.prompts for seed in seeds]
        rows = tuple(
            ImageRow(prompt=prompt, seed=seed, scores=scores)
            for (prompt, seed), scores in zip(names, readings.pairs, strict=True)
        )
        return PolicyResult(
            policy=side.policy.spec,
            fingerprint=side.policy.fingerprint,
            role=Role.POLICY if side.policy.fingerprint in asked else Role.CONTROL,
            fidelity=self._fidelity(readings),
            timing=self._timing(readings),
            flops_ratio=readings.flops_ratio,
            beats=None,
            rows=rows,
            shown=self._shown(side, rows),
        )

    def _shown(self, side: Side, rows: Sequence[ImageRow]) -> tuple[ShownImage, ...]:
        places = [i for batch in self.batches for i in self._places(batch)]
        worst = sorted(range(len(rows)), key=lambda i: rows[i].psnr)[:MOST_SHOWN]
        return tuple(
            ShownImage(
                row=rows[i],
                picture=self.store.image(side.key, places[i]),
                reference=self.store.image(side.judged_by, places[i]),
                maps=self.store.maps(side.key, places[i]),
            )
            for i in sorted(worst)
        )

    def _places(self, batch: int) -> range:
        first = self.setup.first_image(batch)
        return range(first, first + len(self.setup.batches[batch]) * self.setup.seeds)

    def _timing(self, readings: Readings) -> Timing:
        speedups = {name: spread(readings.ratios[part]) for name, part in _PARTS.items()}
        num_batches = len(self.batches)
        by_scale = np.asarray(readings.scale_ms, dtype=np.float64).T
        return Timing(
            speedup=Speedup(**{name: found.median for name, found in speedups.items()}),
            speedups=speedups,
            intervals={n: interval(readings.ratios[part], num_batches, "median") for n, part in _PARTS.items()},
            latency_ms=spread(readings.ms["total"]),
            transformer_ms=spread(readings.ms["transformer"]),
            scales=tuple((grid, spread(ms.tolist())) for grid, ms in zip(readings.grids, by_scale, strict=True)),
            runs=readings.runs,
        )

    def _with_beats(self, results: Sequence[PolicyResult], rivals: set[str], reference: Readings) -> list[PolicyResult]:
        contests = {
            side.policy.fingerprint: self._contest(side.policy.name, side.policy.spec, self._read(side))
            for side in self.sides.policies
        }
        controls = [contest for key, contest in contests.items() if key in rivals]
        if self.sides.full is self.sides.reference:
            other = replace(self._read(self.sides.other_seed), ms=reference.ms, ratios=reference.ratios)
            controls.append(self._contest(ANOTHER_SEED, ANOTHER_SEED, other))
        return [
            replace(result, beats=beats(contests[result.fingerprint], controls, len(self.prompts)))
            if result.role is Role.POLICY
            else result
            for result in results
        ]

    def _contest(self, control: str, setting: str, readings: Readings) -> Contest:
        psnrs = tuple(pair.value("psnr") for pair in readings.pairs)
        ms, ratios = readings.ms["transformer"], readings.ratios["transformer"]
        # Milliseconds of two processes say nothing; ratios were formed within turns.
        cost = float(np.median(ms)) if self.sessions == 1 else 1 / float(np.median(ratios))
        return Contest(
            control=control, setting=setting, cost=cost, psnrs=psnrs, mean_psnr=float(np.nanmean(np.asarray(psnrs)))
        )
