"""Runs policies in turns over the same prompts and seeds, and reads what came of it.

A turn is one batch of prompts in one round: the reference and every policy generate it one after the other, in another
order each time, so that a machine that slows down slows all of them. A ratio is formed within a turn.
Everything goes to a store at once, so that an interruption loses nothing; where a turn was cut, the reference runs
again beside what was left of it.
"""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.eval.judges import Judge, identity
from foveate.eval.pairs import PairScores, score_pairs
from foveate.eval.store import Call, Store
from foveate.families.loading import LoadedModel
from foveate.families.spec import ModelSpec
from foveate.pipeline.call import Job, resolve
from foveate.pipeline.options import Options
from foveate.pipeline.output import describe
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.pipeline.said_once import warnings_once
from foveate.policies.registry import load_policy
from foveate.viz.scale_map import scale_maps

PARTS = ("transformer", "decoder", "total")
"""Of a call's time."""

SET_HERE = (
    "policy", "budget", "latency_budget_ms", "seed", "generator", "num_images_per_prompt", "output_type", "trace",
)  # fmt: skip
"""Options that a comparison sets itself; a budget would replace every policy, the reference too."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Setup:
    """What every policy generates, and how it is judged.

    Attributes:
        prompts: One or more texts.
        seeds: Images per prompt, from `first_seed` on.
        first_seed: Of every prompt.
        against: The reference.
        runs: How often every batch is timed with every policy.
        batch_size: Images generated as one call at most (never less than one prompt's images).
        options: Other options of every call.
        judges: Who else scores.
    """

    prompts: tuple[str, ...]
    seeds: int
    first_seed: int
    against: Policy
    runs: int
    batch_size: int
    options: Options
    judges: tuple[Judge, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seeds", "runs", "batch_size"):
            if getattr(self, name) < 1:
                raise FoveateError(f"{name} must be 1 or more, got {getattr(self, name)}")
        taken = [name for name in SET_HERE if name in self.options]
        if taken:
            raise FoveateError(f"a comparison sets {', '.join(taken)} itself; leave it out of options")
        if not self.prompts:
            raise FoveateError("a comparison needs at least one prompt, got none")
        check_judges(self.judges)

    @property
    def batches(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of every call."""
        size = max(self.batch_size // self.seeds, 1)
        return tuple(self.prompts[i : i + size] for i in range(0, len(self.prompts), size))

    def first_image(self, batch: int) -> int:
        """Index of a batch's first image among all."""
        return batch * max(self.batch_size // self.seeds, 1) * self.seeds

    def job(self, spec: ModelSpec) -> Job:
        """All prompts as one call of the reference, completed from the model's defaults.

        Raises:
            FoveateError: What the model refuses.
        """
        call = {
            **self.options,
            "policy": self.against,
            "seed": self.first_seed,
            "num_images_per_prompt": self.seeds,
        }
        return resolve(list(self.prompts), cast(Options, call), spec)

    def config(self, spec: ModelSpec, model: LoadedModel | None = None) -> dict[str, Any]:
        """What decides a measurement beside its policies and rounds, as plain data; a loaded model adds to it."""
        job = self.job(spec)
        kept = {name: list(value) if isinstance(value, tuple) else value for name, value in job.kept.items()}
        made = {} if model is None else describe(job, model)
        found = {**kept, "model": spec.name, "negative_prompts": job.negatives and list(job.negatives), **made}
        # Of a call; and whether rows are independent is known of a loaded model only.
        own = ("format", "prompts", "seeds", "num_images_per_prompt", "policy", *([] if made else ["batch_invariant"]))
        return {
            "kind": "comparison",
            "prompts": list(self.prompts),
            "seeds": self.seeds,
            "first_seed": self.first_seed,
            "batch_size": self.batch_size,
            "against": {"spec": self.against.spec, "fingerprint": self.against.fingerprint},
            "judges": [judge.name for judge in self.judges],
            "judged_by": {judge.name: identity(judge) for judge in self.judges},
            "generation": {name: value for name, value in found.items() if name not in own},
        }


def check_judges(judges: Sequence[Judge]) -> None:
    """Refuses judges whose figures could not be told apart.

    Raises:
        FoveateError: Two have one name, or one has that of another figure or none that a bound could say.
    """
    names = [judge.name for judge in judges]
    wrong = next((n for n in names if names.count(n) > 1 or n in PairScores.__slots__ or not n.isidentifier()), None)
    if wrong is not None:
        raise FoveateError(f"a judge needs a name of its own in letters and underscores, got {wrong!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One policy's part of every turn.

    Attributes:
        key: Its name in a store.
        policy: What runs.
        seed_offset: Added to the first seed.
        judged_by: Key of the side whose images are its references; its own for a reference.
        is_timed: Whether it runs in every round, or once for its images.
    """

    key: str
    policy: Policy
    seed_offset: int = 0
    judged_by: str
    is_timed: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Everything that runs: the reference, the policies, and the full run with another seed."""

    reference: Side
    policies: tuple[Side, ...]
    other_seed: Side
    full: Side

    @classmethod
    def of(cls, policies: Sequence[Policy], setup: Setup) -> "Sides":
        """The sides of a comparison; a policy that comes twice is measured once."""
        fingerprint = setup.against.fingerprint
        reference = Side(key=f"reference-{fingerprint}", policy=setup.against, judged_by=f"reference-{fingerprint}")
        full = reference
        if setup.against.spec != "full":
            full = Side(key="full-once", policy=load_policy("full"), judged_by="full-once", is_timed=False)
        unique = {policy.fingerprint: policy for policy in policies}
        return cls(
            reference=reference,
            policies=tuple(Side(key=key, policy=policy, judged_by=reference.key) for key, policy in unique.items()),
            other_seed=Side(
                key="another-seed",
                policy=full.policy,
                seed_offset=setup.seeds,
                judged_by=full.key,
                is_timed=False,
            ),
            full=full,
        )

    def all(self) -> tuple[Side, ...]:
        """In the order of a turn; the references first."""
        extra = () if self.full is self.reference else (self.full,)
        return (self.reference, *extra, self.other_seed, *self.policies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """What a store knows of one side, over the batches that are complete for all sides.

    Attributes:
        pairs: Scores, prompt-major.
        ratios: Reference over side, by part of the time; one per batch, the median over its rounds.
        ms: By part; one per batch, the median over its rounds.
        scale_ms: Of every scale; one list per batch.
        grids: Of every scale.
        flops_ratio: Run over full.
        runs: Rounds that every batch has at least.
    """

    pairs: tuple[PairScores, ...]
    ratios: Mapping[str, tuple[float, ...]]
    ms: Mapping[str, tuple[float, ...]]
    scale_ms: tuple[tuple[float, ...], ...]
    grids: tuple[tuple[int, int], ...]
    flops_ratio: float
    runs: int


def measure(pipe: Pipeline, sides: Sides, setup: Setup, store: Store, *, hides_progress: bool | None = None) -> bool:
    """Runs what a store does not have yet.

    Args:
        pipe: The model; its own progress bar should be off, as it would be timed.
        sides: What runs.
        setup: Over what.
        store: Takes every call when it is done.
        hides_progress: False shows progress and the time left on stderr, True hides it, None shows it only where that
            is a terminal.

    Returns:
        Whether all of it is there; Ctrl-C ends it early, with everything until then in the store.
    """
    turns = [(batch, run) for batch in range(len(setup.batches)) for run in range(setup.runs)]
    due = {turn: _due(sides, store, *turn) for turn in turns}
    fresh = {side.key: side for calls in due.values() for side in calls if side.is_timed}
    runner = _Runner(pipe=pipe, setup=setup, store=store, session=secrets.token_hex(4))
    num_calls = len(fresh) + sum(map(len, due.values()))
    try:
        with warnings_once(), tqdm(total=num_calls, disable=hides_progress, unit="call", leave=False) as bar:
            bar.set_description("warm-up")
            for side in fresh.values():
                runner.generate(side, setup.batches[0])
                bar.update()
            for batch, run in turns:
                bar.set_description(f"prompt {batch * len(setup.batches[0]) + 1} of {len(setup.prompts)}")
                calls = due[(batch, run)]
                # No side always runs behind the same one, which may have left the caches warm for it.
                for place in np.random.default_rng((batch, run)).permutation(len(calls)):
                    runner.call(calls[place], batch, run)
                    bar.update()
                for side in sides.all():
                    runner.score(side, batch)
    except KeyboardInterrupt:
        return False
    return True


def _due(sides: Sides, store: Store, batch: int, run: int) -> list[Side]:
    """What a turn still has to run; with the reference wherever something is timed."""

    def is_due(side: Side) -> bool:
        return run not in _runs(store, side, sides.reference, batch) and (side.is_timed or run == 0)

    found = [side for side in sides.all() if is_due(side)]
    if sides.reference not in found and any(side.is_timed for side in found):
        found.insert(0, sides.reference)
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Runner:
    """Makes calls and keeps what came of them."""

    pipe: Pipeline
    setup: Setup
    store: Store
    session: str

    @property
    def _has_maps(self) -> bool:
        """Whether calls record what ran for every token: on a CPU that takes no time, a device would be waited for."""
        return self.pipe.model.device.type == "cpu"

    def generate(self, side: Side, prompts: Sequence[str]) -> Any:  # noqa: ANN401 - of the form that the options ask for
        """One call."""
        call = {
            **self.setup.options,
            "num_images_per_prompt": self.setup.seeds,
            "seed": self.setup.first_seed + side.seed_offset,
            "policy": side.policy,
            "output_type": "np",
            "trace": self._has_maps,
        }
        return self.pipe(list(prompts), **cast(Options, call))

    def call(self, side: Side, batch: int, run: int) -> None:
        """One call of a turn; the first one of a batch keeps its images, the others have the same."""
        output = self.generate(side, self.setup.batches[batch])
        if (side.key, batch) not in self.store.calls:
            first = self.setup.first_image(batch)
            for i, picture in enumerate(stack_uint8(output.images)):
                maps = scale_maps(output.trace, i) if self._has_maps else ()
                self.store.add_image(side.key, first + i, picture, maps)
        ms = output.report.ms
        self.store.add_call(
            Call(
                side=side.key,
                batch=batch,
                run=run,
                session=self.session,
                ms={part: getattr(ms, part) for part in ("text", *PARTS)},
                scale_ms=tuple(scale.ms for scale in output.trace.scales),
                grids=tuple(scale.grid for scale in output.trace.scales),
                flops_run=output.report.flops_run,
                flops_full=output.report.flops_full,
            )
        )

    def score(self, side: Side, batch: int) -> None:
        """Scores the images of a batch, once; a reference only for the judges."""
        is_reference = side.judged_by == side.key
        if (side.key, batch) in self.store.scores or (is_reference and not self.setup.judges):
            return
        images, references = self._images(side.key, batch), self._images(side.judged_by, batch)
        prompts = [prompt for prompt in self.setup.batches[batch] for _ in range(self.setup.seeds)]
        self.store.add_scores(side.key, batch, score_pairs(images, references, prompts, self.setup.judges))

    def _images(self, key: str, batch: int) -> np.ndarray:
        first = self.setup.first_image(batch)
        indices = range(first, first + len(self.setup.batches[batch]) * self.setup.seeds)
        return np.stack([self.store.image(key, index) for index in indices])


def complete_batches(sides: Sides, setup: Setup, store: Store) -> tuple[int, ...]:
    """The batches that every side has images, scores and, where it is timed, a time of."""

    def is_there(side: Side, batch: int) -> bool:
        is_reference = side.judged_by == side.key
        has_run = bool(_runs(store, side, sides.reference, batch))
        return has_run and (is_reference or (side.key, batch) in store.scores)

    return tuple(b for b in range(len(setup.batches)) if all(is_there(side, b) for side in sides.all()))


def read(store: Store, side: Side, reference: Side, batches: Sequence[int]) -> Readings:
    """What a store knows of a side."""
    calls = [store.calls[(side.key, batch)] for batch in batches]
    pairs = [pair for batch in batches for pair in store.scores.get((side.key, batch), ())]
    beside = {(c.batch, c.run, c.session): c for batch in batches for c in store.calls[(reference.key, batch)]}
    return Readings(
        pairs=tuple(pairs),
        ratios={part: tuple(_medians(_ratios(own, beside, part) for own in calls)) for part in PARTS},
        ms={part: tuple(_medians((call.ms[part] for call in own) for own in calls)) for part in PARTS},
        scale_ms=tuple(tuple(map(median, zip(*(call.scale_ms for call in own), strict=True))) for own in calls),
        grids=calls[0][0].grids,
        flops_ratio=sum(own[0].flops_run for own in calls) / sum(own[0].flops_full for own in calls),
        runs=min(len(_runs(store, side, reference, batch)) for batch in batches),
    )


def _runs(store: Store, side: Side, reference: Side, batch: int) -> set[int]:
    """Rounds of a batch that a side has; where it is timed, only those that the reference ran beside it."""
    beside = {(call.run, call.session) for call in store.calls.get((reference.key, batch), ())}
    own = store.calls.get((side.key, batch), ())
    return {call.run for call in own if not side.is_timed or (call.run, call.session) in beside}


def num_sessions(store: Store, sides: Sides, batches: Sequence[int]) -> int:
    """Processes that the times come from."""
    timed = [side for side in sides.all() if side.is_timed]
    return len({call.session for side in timed for batch in batches for call in store.calls[(side.key, batch)]})


def _ratios(calls: Sequence[Call], beside: Mapping[tuple[int, int, str], Call], part: str) -> Iterator[float]:
    """Reference over side in every turn of one batch."""
    for call in calls:
        other = beside.get((call.batch, call.run, call.session))
        if other is not None:
            yield other.ms[part] / max(call.ms[part], 1e-9)


def _medians(groups: Any) -> Iterator[float]:  # noqa: ANN401 - iterables of iterables of numbers
    for group in groups:
        values = list(group)
        yield median(values) if values else math.nan
