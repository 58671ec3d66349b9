"""CachedGuidance against a slow twin: row by row, the difference kept and resized by hand, on bits and on ids."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import CachedDifference, KeepDifference, narrowed
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast
from foveate.engine.state import Request, bounds_of
from foveate.models.var import VAR
from foveate.policies.cached_guidance import CachedGuidance
from foveate.policies.registry import load_policy
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer
from tests.policies.lattices import lowest
from tests.policies.twins import assert_same, full_steps, generate_image, reads_inputs
from tests.toys import (
    LATENT_CHANNELS,
    LENGTHS,
    SEEDS,
    VAR_GRIDS,
    VAR_LABELS,
    Toy,
    cached_run,
    checked,
    label_request,
    make_request,
    make_var,
    randomise,
    run,
    same_bits,
    toy,
    toy_var,
)


@cache
def wide_var() -> Toy:
    """The toy of the VAR family with more codes than its width, as published: differences are head inputs."""
    model = VAR(replace(make_var().config, codebook_size=96))
    randomise(model, seed=9)
    autoencoder = Autoencoder(
        AutoencoderConfig(
            latent_channels=LATENT_CHANNELS,
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            codebook_size=96,
        )
    )
    randomise(autoencoder, seed=8)
    return Toy(
        name="wide var",
        model=model.requires_grad_(requires_grad=False).eval(),
        tokenizer=VQTokenizer(autoencoder.requires_grad_(requires_grad=False).eval()),
        schedule=ScaleSchedule.from_grids(VAR_GRIDS),
    )


def subject_of(name: str) -> tuple[Toy, Request]:
    if name.endswith("var"):
        subject = toy_var() if name == "var" else wide_var()
        return subject, label_request(subject.schedule)
    return toy(name), make_request(toy(name).schedule)


SUBJECTS = ("odd", "wide", "patches", "var", "wide var")


# Slow twins


def steps_of(subject: Toy, policy: CachedGuidance):
    """What every scale of an image runs."""
    steps, first = full_steps(subject), max(len(subject.schedule) - policy.count, 1)
    for scale in range(first, len(steps)):
        guided = lowest(subject.schedule.grids[scale], policy.keep_ratio)
        steps[scale] = replace(steps[scale], guided=guided, source=first - 1, weight=policy.weight)
    return steps


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize(
    "policy",
    [
        CachedGuidance(),
        CachedGuidance(keep_ratio=0.25),
        CachedGuidance(count=2, weight=1.0),
        CachedGuidance(count=2, keep_ratio=0.25, weight=0.8),
    ],
    ids=lambda policy: policy.spec,
)
def test_run_equals_the_twin(policy: CachedGuidance, name: str):
    subject, request = subject_of(name)
    assert reads_inputs(subject) == (name in ("patches", "wide var"))
    result = run(subject, policy, request)
    assert result.trace.unfired == ()
    assert_same(result, generate_image(subject, request, 1, steps_of(subject, policy)), 1)
    full = run(subject, load_policy("full"), request)
    first = max(len(subject.schedule) - policy.count, 1)
    assert torch.equal(result.f_hats[first - 1], full.f_hats[first - 1])
    assert not torch.equal(result.f_hat, full.f_hat)


def test_branch_runs_on_a_share_of_what_another_part_keeps():
    """The lattice ranks the kept tokens; keys of the unconditional branch are those of the tokens that ran in it."""
    subject, policy = toy("odd"), CachedGuidance(count=2, keep_ratio=0.3, weight=0.7)
    request = make_request(subject.schedule)
    result = run(subject, load_policy("random-tokens:fill=zero,num_scales=2,keep_ratio=0.6") | policy, request)
    steps = steps_of(subject, policy)
    for scale in (3, 4):
        kept = tuple(result.choices[scale].kept[2].tolist())
        guided = lowest(subject.schedule.grids[scale], 0.3, kept)
        assert len(guided) == math.ceil(0.3 * len(kept)) < len(kept)
        steps[scale] = replace(steps[scale], kept=kept, guided=guided)
    assert_same(result, generate_image(subject, request, 2, steps), 2)


def test_difference_is_kept_where_guidance_itself_does_not_read_it():
    """At scale 3 w = 1, so only the cache asks for the unconditional branch's outputs there."""
    subject, policy = toy("wide"), CachedGuidance(weight=1.0)
    request = make_request(subject.schedule, weights=(2.0, 2.5, 3.0, 1.0, 3.0))
    result = run(subject, policy, request)
    assert_same(result, generate_image(subject, request, 1, steps_of(subject, policy)), 1)


# Which tokens


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.75])
@pytest.mark.parametrize("name", ["square", "odd", "patches"])
def test_counts_are_known_before_the_run(name: str, ratio: float):
    subject, policy = toy(name), CachedGuidance(count=2, keep_ratio=ratio)
    request = make_request(subject.schedule)
    bound = policy.bind(subject.schedule, subject.model.shape)
    trace = run(subject, bound, request).trace
    assert bound.is_static
    assert forecast(bound, request, subject.model.shape) == trace.cost
    for scale in (3, 4):
        num_tokens, rows = subject.schedule.scales[scale].num_tokens, trace.scales[scale].work.rows
        assert [rows[(i, True)].head_tokens for i in range(3)] == [num_tokens] * 3
        assert [rows[(i, False)].block_tokens for i in range(3)] == [(math.ceil(ratio * num_tokens - 1e-9),) * 5] * 3


@pytest.mark.parametrize("other", ["random-tokens", "depthvar", "ld-pruning:sats=false"])
def test_ceiling_bounds_a_composition(other: str):
    subject = toy("odd")
    request = make_request(subject.schedule)
    bound = (load_policy(other) | CachedGuidance(count=2, keep_ratio=0.25)).bind(subject.schedule, subject.model.shape)
    trace = run(subject, bound, request).trace
    before = forecast(bound, request, subject.model.shape)
    assert trace.cost.flops <= before.flops
    assert trace.cost.kv_bytes <= before.kv_bytes
    assert not bound.is_static


@pytest.mark.parametrize("ratio", [0.25, 0.3])
def test_ceiling_runs_the_first_tokens(ratio: float):
    """Tokens of smaller index stand for those that run most, so that the ceilings of several parts nest."""
    subject = toy("odd")
    ceiling = CachedGuidance(keep_ratio=ratio).bind(subject.schedule, subject.model.shape).ceiling(4)
    guided = narrowed(ceiling.unconditional_tokens, None, 1, 63)[0]
    assert guided.tolist() == [token < math.ceil(ratio * 63) for token in range(63)]


# Laws


@pytest.mark.parametrize("name", SUBJECTS)
def test_whole_branch_and_no_scale_are_full_and_no_weight_is_drop_branch(name: str):
    subject, request = subject_of(name)
    full = run(subject, load_policy("full"), request)
    for policy in (CachedGuidance(keep_ratio=1.0, count=2), CachedGuidance.neutral()):
        result = run(subject, policy, request)
        assert same_bits(result, full)
        assert result.bound.directives == result.trace.unfired == ()
    dropped = run(subject, load_policy("drop-branch:count=2"), request)
    alone = run(subject, CachedGuidance(count=2, weight=0.0), request)
    assert same_bits(alone, dropped)
    assert alone.trace.cost == dropped.trace.cost


def test_saving_is_that_of_the_rows_that_do_not_run():
    result, full = cached_run("cached-guidance", "square"), cached_run("full", "square")
    assert result.trace.cost == cached_run("drop-branch:count=1", "square").trace.cost
    assert [len(scale.work.rows) for scale in result.trace.scales] == [6, 6, 6, 6, 3]
    part = cached_run("cached-guidance:keep_ratio=0.25", "square")
    assert [len(scale.work.rows) for scale in part.trace.scales] == [6] * 5
    assert result.trace.cost.flops < part.trace.cost.flops < full.trace.cost.flops


def test_a_larger_count_leaves_the_first_scale_guided():
    result = cached_run("cached-guidance:count=99", "square")
    assert [len(scale.work.rows) for scale in result.trace.scales] == [6, 3, 3, 3, 3]
    assert [bool(result.bound.keeps(scale)) for scale in range(5)] == [True] + [False] * 4


def test_another_part_that_drops_the_branch_decides():
    """No guidance is cheaper than a cached one."""
    both = cached_run("drop-branch:count=3|cached-guidance", "odd")
    assert same_bits(both, cached_run("drop-branch:count=3", "odd"))
    assert same_bits(run(toy("odd"), load_policy("cached-guidance|drop-branch:count=3")), both)


@pytest.mark.parametrize("name", ["odd", "wide var"])
def test_branch_that_stopped_by_content_leaves_the_conditional_one_alone(name: str):
    """Whether all images stopped before the difference could be kept or some: the same as each of them alone."""
    subject, request = subject_of(name)
    stopping = "ld-pruning:lhep=false,sats_threshold={}"
    always = run(subject, load_policy(f"{stopping.format(1e9)}|cached-guidance"), request)
    assert same_bits(always, run(subject, load_policy(stopping.format(1e9)), request))
    some = load_policy(f"{stopping.format(0.2)}|cached-guidance")
    together = run(subject, some, request)
    assert {len(scale.work.rows) for scale in together.trace.scales} > {3, 6}, "no scale has images of both kinds"
    for image, f_hat_ZHW in enumerate(together.f_hat):
        own = slice(image, image + 1)
        if name.endswith("var"):
            one = run(subject, some, label_request(subject.schedule, SEEDS[own], VAR_LABELS[own]))
        else:
            one = run(subject, some, make_request(subject.schedule, SEEDS[own], LENGTHS[own]))
        assert torch.allclose(one.f_hat[0], f_hat_ZHW, atol=1e-5)


def test_skipped_scales_leave_what_the_others_read():
    subject = toy("square")
    plans = load_policy("cached-guidance:count=2|skip-scales:count=1")
    assert plans.bind(subject.schedule, subject.model.shape).keeps(2) == {KeepDifference()}
    assert torch.isfinite(run(subject, plans).f_hat).all()
    # Everything that could read the difference is left out with its source.
    assert torch.isfinite(run(subject, load_policy("cached-guidance|skip-scales:count=2")).f_hat).all()


# Memory and promises


@pytest.mark.parametrize("name", SUBJECTS)
def test_difference_lies_inside_the_memory_bound(name: str):
    """One map of head inputs or outputs of the scale in front, whichever is narrower, float32."""
    subject, request = subject_of(name)
    shape = subject.model.shape
    values = 3 * subject.schedule.scales[3].num_tokens * min(shape.width, shape.head_outputs)
    limits = bounds_of(CachedGuidance().bind(subject.schedule, shape), request, shape)
    assert limits.difference_values == values
    assert limits.fill_bytes(4) == 4 * values
    result, full = run(subject, CachedGuidance(), request), run(subject, load_policy("full"), request)
    assert result.trace.peak_cache_bytes - full.trace.peak_cache_bytes == 4 * values


def test_promises_follow_the_settings_and_what_happened():
    subject = toy("square")
    assert [d.value for d in run(subject, CachedGuidance()).bound.directives] == ["stop the unconditional branch"]
    part = run(subject, CachedGuidance(keep_ratio=0.5))
    assert [d.value for d in part.bound.directives] == ["run the unconditional branch on fewer tokens"]
    assert {d.value for d in part.trace.fired()} == {"run the unconditional branch on fewer tokens"}
    unguided = make_request(subject.schedule, weights=(1.0,) * 5)
    for policy in (CachedGuidance(), CachedGuidance(keep_ratio=0.5)):
        result = run(subject, policy, unguided)
        assert result.trace.unfired == tuple(d.value for d in result.bound.directives)
        assert same_bits(result, run(subject, load_policy("full"), unguided))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_guidance_inside_the_blocks_is_refused(ratio: float):
    request = make_request(toy("square").schedule, hidden_blocks=(2,))
    with pytest.raises(PlanConflictError, match="guidance inside the blocks makes both branches' logits equal"):
        run(toy("square"), CachedGuidance(keep_ratio=ratio, weight=0.0), request)


def test_plan_says_how_much_guides():
    bound = CachedGuidance(weight=0.25).bind(toy("square").schedule, toy("square").model.shape)
    assert bound.plan(4, None, None)[0].difference == CachedDifference(weight=0.25)
    assert bound.plan(3, None, None)[0].difference is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", -1), ("keep_ratio", -0.1), ("keep_ratio", 1.1),
        ("weight", -1.0), ("weight", math.inf), ("weight", math.nan),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(field: str, value: float):
    with pytest.raises(FoveateError, match=f"{field} must be .*, got {value}"):
        checked(CachedGuidance(), field, value)
