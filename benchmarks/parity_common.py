"""What the families share when recorded cases are run again: weights from names, the forced run, the comparison.

A case runs once. The recorded codes are forced, and at every scale the case's own sampler is asked what it would choose
from the same logits: where that is what was recorded, at every scale, the free run is this run.
Axes: B images, l tokens of a scale, d symbols of a token, V values of a symbol, n recorded positions.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.core.plan import Keep, ScalePlan, SublayerSelection
from foveate.core.policy import Bound, Policy
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.signals import Record as Signal
from foveate.core.signals import Signals
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler, ReferenceSampler, Sampler
from foveate.engine.state import Request
from foveate.policies.fastvar import KEPT_GRID, PRUNED_WIDTHS, SKIPPED_WIDTHS, FastVAR
from foveate.policies.full import Full

TOLERANCE = 1e-4
"""Largest difference over the standard deviation of what was recorded in float32."""
HALF_TOLERANCE = 5e-3
"""The same for what was recorded in float16."""
CLEAR_CUT = 1e-5
"""A cut among tokens is clear where the scores on its two sides differ by this much of their standard deviation."""

PIXELS = ("decoded", "image01", "decoded_f16", "image01_f16")
"""Under one of these names a record has pixels, in float32 or float16."""

Case = dict[str, Any]
"""The `.json` of a case."""
Record = dict[str, Tensor]
"""The `.safetensors` of a case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One case; errors are largest differences relative to the standard deviation of what was recorded, if it was."""

    case: str
    status: str
    reason: str = ""
    max_logit_error: float | None = None
    codes_equal: bool | None = None
    latent_error: float | None = None
    image_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """A scale that ran: its logits, and whether the case's own sampler agrees with the record on them."""

    scale: int
    logits_BldV: Float[Tensor, "B l d V"]
    is_agreed: bool


@dataclass(kw_only=True, slots=True, eq=False)
class ForcingSampler(Sampler):
    """Answers with recorded symbols, by scale, and asks another sampler what it would have chosen."""

    inner: Sampler
    recorded: Mapping[int, Int[Tensor, "B l d"]]
    steps: list[Step] = field(default_factory=list)

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "k d V"]],
        kept: Sequence[Int[Tensor, " k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "k d"]]:
        """The recorded symbols; near ties count as agreed."""
        recorded_Bld, logits_BldV = self.recorded[scale], torch.stack(list(logits))
        before = self.inner.state()
        chosen_Bld = torch.stack(self.inner.choose(scale, grid, logits, kept, rule))
        is_agreed = torch.equal(chosen_Bld, recorded_Bld)
        if not is_agreed:
            self.inner.restore(before)
            leaning = list(lean(logits_BldV, chosen_Bld, recorded_Bld))
            is_agreed = torch.equal(torch.stack(self.inner.choose(scale, grid, leaning, kept, rule)), recorded_Bld)
        self.steps.append(Step(scale=scale, logits_BldV=logits_BldV, is_agreed=is_agreed))
        return list(recorded_Bld)


class WatchedBound(Bound):
    """A bound policy; `cuts` holds, per scale, the nearest cut among tokens, over the spread of their scores."""

    def __init__(self, inner: Bound) -> None:
        self.inner, self.cuts = inner, dict[int, float]()
        self.directives, self.notes, self.is_static = inner.directives, inner.notes, inner.is_static

    def record(self, scale: int) -> frozenset[Signal]:
        """Delegates."""
        return self.inner.record(scale)

    def keeps(self, scale: int) -> frozenset[Keep]:
        """Delegates."""
        return self.inner.keeps(scale)

    def start(self) -> Any:  # noqa: ANN401 - a policy's state is its own business
        """Delegates."""
        return self.inner.start()

    def ceiling(self, scale: int) -> ScalePlan:
        """Delegates."""
        return self.inner.ceiling(scale)

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:  # noqa: ANN401 - as above
        """The same plan; its scorers are watched."""
        plan, state = self.inner.plan(scale, signals, state)
        parts = [replace(part, scorer=partial(self._watched, scale, part)) for part in plan.sublayers]
        return replace(plan, sublayers=tuple(parts)), state

    def _watched(self, scale: int, part: SublayerSelection, x_RlC: Float[Tensor, "R l C"]) -> Float[Tensor, "R l"]:
        score_Rl = part.scorer(x_RlC)
        if part.count < score_Rl.shape[-1]:
            sorted_Rl = score_Rl.sort(descending=True).values
            gap_R = (sorted_Rl[:, part.count - 1] - sorted_Rl[:, part.count]) / score_Rl.std(-1, correction=0)
            self.cuts[scale] = min(self.cuts.get(scale, math.inf), float(gap_R.min()))
        return score_Rl


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Forced:
    """What a run with recorded codes came to; `cuts` are those of `WatchedBound`, pixels are there if asked for."""

    steps: tuple[Step, ...]
    latent_BZHW: Float[Tensor, "B Z H W"]
    pixels_B3YX: Float[Tensor, "B 3 Y X"] | None
    cuts: Mapping[int, float]


def named_weights(entries: Sequence[tuple[str, list[int], float, float]], seed: int) -> dict[str, Tensor]:
    """The weights that follow from names: normal draws seeded with a checksum of the name; float32."""
    weights = {}
    for key, shape, mean, std in entries:
        draw = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
        weights[key] = torch.from_numpy(np.asarray(mean + std * draw, dtype=np.float32))
    return weights


def per_scale(value: float | Sequence[float], num_scales: int) -> tuple[float, ...]:
    """A number for every scale, from one number or a list."""
    values = [value] * num_scales if isinstance(value, int | float) else list(value)
    return tuple(float(v) for v in values[:num_scales])


def filters_of(case: Case, num_scales: int) -> tuple[Filter, ...]:
    """Top-k and top-p of every scale."""
    rules = zip(per_scale(case["top_k"], num_scales), per_scale(case["top_p"], num_scales), strict=True)
    return tuple(Filter(top_k=int(top_k), top_p=top_p) for top_k, top_p in rules)


def sampler_of(case: Case, filters: Sequence[Filter], num_images: int) -> Sampler:
    """The case's own sampler: greedy, or draws in the published order."""
    if all(rule.is_greedy for rule in filters):
        return KeyedSampler(seeds=(0,) * num_images)
    return ReferenceSampler(generator=torch.Generator().manual_seed(int(case["g_seed"])))


def num_steps(record: Record) -> int:
    """How many scales ran when the case was recorded."""
    return sum(name.startswith("step") and name.endswith(".logits") for name in record)


def recorded_ids(record: Record) -> tuple[Int[Tensor, "B l 1"], ...]:
    """Recorded ids, one per token."""
    return tuple(record[f"step{i:02d}.indices"].long().unsqueeze(-1) for i in range(num_steps(record)))


def policy_by_widths(case: Case, schedule: ScaleSchedule) -> Policy | None:
    """The policy of a case: FastVAR by scale index where its widths and its grid name such scales, else by width.

    Raises:
        UnsupportedError: Another policy, or widths that neither rule can say.
    """
    said = case.get("policy")
    if said is None:
        return None
    if said["name"] != FastVAR.name:
        raise UnsupportedError(f"policy {said['name']} not available")
    keep = {int(width): 1 - ratio for width, ratio in said["prune"].items()}
    blocks = {"first_block": said["layers"][0], "last_block": said["layers"][1]}
    kept = [s for s, grid in enumerate(schedule.grids) if grid == tuple(said["cache"])]
    pruned = [s for s, (_, width) in enumerate(schedule.grids) if width in keep]
    skipped = [s for s, (_, width) in enumerate(schedule.grids) if width in said["skipped_widths"]]
    end = len(schedule) - len(skipped)
    if len(kept) == 1 and pruned == [end - 2, end - 1] and skipped == list(range(end, len(schedule))):
        first, second = (keep[schedule.grids[s][1]] for s in pruned)
        reference = kept[0] - len(schedule)
        return FastVAR(
            keep_first=first, keep_second=second, skip_last=len(skipped), reference_scale=reference, **blocks
        )
    is_published = (tuple(keep), tuple(said["skipped_widths"])) == (PRUNED_WIDTHS, SKIPPED_WIDTHS)
    if not is_published or tuple(said["cache"]) != KEPT_GRID:
        raise UnsupportedError(f"FastVAR with the widths {tuple(keep)} and {tuple(said['skipped_widths'])}")
    first, second = keep.values()
    return FastVAR(keep_first=first, keep_second=second, skip_last=len(SKIPPED_WIDTHS), match="width", **blocks)


def relative_error(found: Tensor, recorded: Tensor) -> float:
    """Largest difference over the standard deviation of what was recorded; infinite for other shapes and NaN."""
    if found.shape != recorded.shape:
        return float("inf")
    recorded = recorded.float()
    if torch.equal(found.float(), recorded):
        return 0.0
    error = float((found.float() - recorded).abs().max() / recorded.std(correction=0))
    return error if math.isfinite(error) else float("inf")


def lean(
    logits_BldV: Float[Tensor, "B l d V"], chosen_Bld: Int[Tensor, "B l d"], recorded_Bld: Int[Tensor, "B l d"]
) -> Float[Tensor, "B l d V"]:
    """Logits that favour what was recorded by the tolerance: the choice follows where it was a near tie and only there.

    So it is judged in the sampler's own terms, for the best logit, a race, top-k and top-p alike.
    """
    half_Bld1 = (chosen_Bld != recorded_Bld).unsqueeze(-1) * (TOLERANCE * logits_BldV.std(correction=0) / 2)
    leaning_BldV = logits_BldV.scatter_add(-1, recorded_Bld.unsqueeze(-1), half_Bld1)
    return leaning_BldV.scatter_add_(-1, chosen_Bld.unsqueeze(-1), -half_Bld1)


def recorded_pixels(record: Record) -> Float[Tensor, "B 3 Y X"] | None:
    """Recorded pixels in [-1, 1], if any: some references recorded these, others the image in [0, 1]."""
    name = next((name for name in PIXELS if name in record), None)
    if name is None:
        return None
    return record[name].float() * 2 - 1 if name.startswith("image01") else record[name].float()


def compare(
    name: str,
    engine: Engine,
    request: Request,
    record: Record,
    symbols: tuple[Int[Tensor, "B l d"], ...],
    policy: Policy | None = None,
    margins: Mapping[str, float | None] | None = None,
) -> Result:
    """Runs a case with its recorded symbols, one tensor per scale that ran, and judges it against its record.

    `margins` are the `smallest_margins` of the case, where it has any.
    """
    wants_pixels = recorded_pixels(record) is not None
    policy = policy or Full()
    sampler = ForcingSampler(inner=request.sampler, recorded=by_scale(engine, request, policy, symbols))
    run = force(engine, request, sampler, policy, wants_pixels=wants_pixels)
    return judge(name, run, record, (margins or {}).get("token_cut"))


def by_scale(
    engine: Engine, request: Request, policy: Policy, symbols: Sequence[Int[Tensor, "B l d"]]
) -> dict[int, Int[Tensor, "B l d"]]:
    """Recorded symbols by the scale that they belong to.

    Raises:
        ValueError: Other scales run than were recorded.
    """
    bound = policy.bind(request.schedule, engine.model.shape)
    scales = [s for s in range(len(request.schedule)) if bound.ceiling(s).runs]
    if len(scales) != len(symbols):
        raise ValueError(f"{len(scales)} scales run, but {len(symbols)} were recorded")
    return dict(zip(scales, symbols, strict=True))


@torch.inference_mode()
def force(engine: Engine, request: Request, sampler: ForcingSampler, policy: Policy, *, wants_pixels: bool) -> Forced:
    """Runs a request with the recorded symbols."""
    bound = WatchedBound(policy.bind(request.schedule, engine.model.shape))
    *_, last = engine.run(bound, replace(request, sampler=sampler))
    pixels_B3YX = engine.tokenizer.decode(last.f_hat_BZHW) if wants_pixels else None
    return Forced(steps=tuple(sampler.steps), latent_BZHW=last.f_hat_BZHW, pixels_B3YX=pixels_B3YX, cuts=bound.cuts)


def judge(name: str, run: Forced, record: Record, recorded_cut: float | None = None) -> Result:
    """Compares a forced run with its record.

    Where a cut among tokens is not clear, other tokens may have run: a case that does not fit from there on is judged
    up to that scale. `recorded_cut` is the nearest cut of the reference's own run; if that was clear, all are.
    """
    result = judged_up_to(name, run, record, len(run.steps))
    unclear = next((scale for scale, cut in sorted(run.cuts.items()) if cut < CLEAR_CUT), None)
    if unclear is None or (recorded_cut is not None and recorded_cut >= CLEAR_CUT):
        return result
    cut = f"a cut among tokens of {run.cuts[unclear]:.1e} at scale {unclear}"
    if result.status == "pass":
        return replace(result, reason=f"{cut} fell as recorded")
    result = judged_up_to(name, run, record, [step.scale for step in run.steps].index(unclear))
    return replace(result, reason=result.reason or f"judged before scale {unclear}: {cut}")


def judged_up_to(name: str, run: Forced, record: Record, end: int) -> Result:
    """Judges the first `end` steps, and the latent and the pixels of the forced codes."""
    steps, found_B3YX, recorded_B3YX = run.steps[:end], run.pixels_B3YX, recorded_pixels(record)
    image_error = None
    if found_B3YX is not None and recorded_B3YX is not None:
        image_error = relative_error(found_B3YX, recorded_B3YX)
    errors = []
    for i, step in enumerate(steps):
        logits_BndV = step.logits_BldV[:, record[f"step{i:02d}.positions"].long()]
        errors.append(relative_error(logits_BndV.flatten(2), record[f"step{i:02d}.logits"].flatten(2)))
    is_half = any(record[name].dtype is torch.float16 for name in PIXELS if name in record)
    return judged(
        Result(
            case=name,
            status="pass",
            max_logit_error=max(errors),
            codes_equal=all(step.is_agreed for step in steps),
            latent_error=relative_error(run.latent_BZHW, record["latent"]),
            image_error=image_error,
        ),
        HALF_TOLERANCE if is_half else TOLERANCE,
    )


def judged(result: Result, image_bound: float) -> Result:
    """The result, failed with a reason if a bound is broken."""
    bounds = {"max_logit_error": TOLERANCE, "latent_error": TOLERANCE, "image_error": image_bound}
    errors = {name: getattr(result, name) for name in bounds}
    broken = [
        f"{name} {error:.2e} is above {bounds[name]:.0e}"
        for name, error in errors.items()
        if error is not None and not error <= bounds[name]
    ]
    if not result.codes_equal:
        broken.append("the free run chooses other codes")
    return replace(result, status="fail", reason="; ".join(broken)) if broken else result
