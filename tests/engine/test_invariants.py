"""The promises of the engine, for every registered policy on real toys: exactness, independence, nothing left behind,
costs known before and counted after."""

import copy
import gc
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate.core.cost import Cost, request_cost
from foveate.core.plan import KeepDifference, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signal
from foveate.core.trace import Trace
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.kv_cache import KVCache
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.scale_run import ScaleRun
from foveate.engine.state import Request, RequestState, bounds_of
from foveate.models.infinity import Infinity
from foveate.policies.registry import REGISTRY, load_policy
from foveate.testing.toys import LATENT_CHANNELS
from tests.engine.naive import draw, generate
from tests.randomness import few
from tests.toys import (
    GRIDS,
    LENGTHS,
    SEEDS,
    FixedBound,
    Result,
    SpySampler,
    Toy,
    cached_run,
    make_request,
    run,
    same_bits,
    text_features,
    toy,
    with_sampler,
)

TOYS = tuple(GRIDS)

ACTIVE = (
    "full",
    "ld-pruning",
    "ld-pruning:sats_threshold=1000",
    "ld-pruning:energy_from=last_computed,fill=zero,skip_last=1,gap_norm=l2,sats_threshold=0.02",
    "depthvar",
    "depthvar:curve=step,rotation=none,order=prefix,fill=identity,blend=depth,rounding=0,reference_scale=2",
    "skip-scales:count=2",
    "drop-branch:count=3",
    "random-tokens",
    "random-tokens:keep_ratio=0.3,fill=zero,num_scales=4",
    "uniform-depth",
    "uniform-depth:fill=identity,keep_ratio=0.7",
    "fastvar:skip_last=1,reference_scale=-4",
    "late-bfloat16",
    "cached-guidance:count=2",
    "cached-guidance:count=2,keep_ratio=0.3",
    "kv-eviction:keep_first=1,window=1",
    "sparsevar:threshold=0.995,stride=3",
    "skipvar",
    "attention-entropy",
    "feature-magnitude",
    "token-variance",
    "fovea",
    "fovea:shares=[0.3],guided_shares=[0.5,0]",
    "blocks-per-scale:keep_ratios=[0.6,0.4]",
    'step-down:steps=["random-tokens","drop-branch"],taken=[0,1]',
    "ld-pruning|depthvar",
    "random-tokens:num_scales=2|uniform-depth:num_scales=1|drop-branch",
)
"""Settings at which every registered policy really does something on a toy."""

FIRST = tuple({spec.partition(":")[0]: spec for spec in reversed(ACTIVE)}.values())
"""One setting of each policy, and of each composition."""

IN_TURN = [(spec, TOYS[i % len(TOYS)]) for i, spec in enumerate(ACTIVE)]
"""Every setting on one of the toys; what must hold on each of them is run on two."""


@pytest.fixture(scope="module", autouse=True)
def _frozen_objects() -> Iterator[None]:
    """What was alive before is not looked at when we search for what a request left over."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_registered_policy_is_among_the_active_ones():
    names = {part.name for spec in ACTIVE for part in load_policy(spec).parts_of()}
    assert names == set(REGISTRY)


# 1. The plain loop


@pytest.mark.in_turn("rule", "name")
@pytest.mark.parametrize("rule", [Filter(top_k=0, top_p=0.0), Filter(top_k=0, top_p=0.8), Filter(top_k=1, top_p=0.0)])
@pytest.mark.parametrize("name", TOYS)
def test_full_equals_the_plain_loop(name: str, rule: Filter):
    subject = toy(name)
    request = make_request(subject.schedule, rule=rule)
    f_hats, bits = generate(subject, request, SEEDS)
    ours = run(subject, REGISTRY["full"].neutral(), request)
    for scale in range(len(subject.schedule)):
        assert torch.equal(torch.stack(ours.choices[scale].symbols), bits[scale])
        assert torch.equal(ours.f_hats[scale], f_hats[scale])


def test_full_equals_the_plain_loop_in_bfloat16():
    subject = toy("wide", torch.bfloat16)
    request = make_request(subject.schedule)
    f_hats, bits = generate(subject, request, SEEDS)
    ours = run(subject, REGISTRY["full"].neutral(), request)
    assert torch.equal(ours.f_hat, f_hats[-1])
    assert torch.equal(torch.stack(ours.choices[4].symbols), bits[4])


def test_full_equals_the_plain_loop_with_negative_prompts():
    subject = toy("square")
    negatives = [text_features(50 + i, length) for i, length in enumerate((4, 4, 6))]
    request = make_request(subject.schedule, negatives=negatives)
    f_hats, _ = generate(subject, request, SEEDS)
    ours = run(subject, REGISTRY["full"].neutral(), request)
    assert torch.equal(ours.f_hat, f_hats[-1])
    assert not torch.equal(ours.f_hat, cached_run("full", "square").f_hat)


@pytest.mark.parametrize(("policy", "name"), [(policy, TOYS[i % 4]) for i, policy in enumerate(REGISTRY)])
def test_neutral_equals_full(policy: str, name: str):
    assert same_bits(run(toy(name), REGISTRY[policy].neutral()), cached_run("full", name))


@pytest.mark.parametrize("spec", ACTIVE[1:])
def test_active_settings_are_not_full(spec: str):
    """The tests below would prove nothing about a setting that leaves everything as it is."""
    assert not same_bits(cached_run(spec, "square"), cached_run("full", "square"))
    is_cheaper = cached_run(spec, "square").trace.cost.flops < cached_run("full", "square").trace.cost.flops
    assert is_cheaper or spec == "late-bfloat16", "a narrower dtype saves time and no FLOPs"


# 2. Independence


@pytest.mark.parametrize("spec", few(ACTIVE, "ld-pruning|depthvar", "skipvar", "cached-guidance:count=2", more=2))
def test_image_by_image_does_not_depend_on_batch_mates(spec: str):
    """The batch-invariant mode runs image by image: what ran before must not matter, bit for bit."""
    subject, policy = toy("odd"), load_policy(spec)
    alone = run(subject, policy, make_request(subject.schedule, SEEDS[:1], LENGTHS[:1]))
    run(subject, policy, make_request(subject.schedule, SEEDS[1:], LENGTHS[1:]))
    again = run(subject, policy, make_request(subject.schedule, SEEDS[:1], LENGTHS[:1]))
    assert same_bits(alone, again)


@pytest.mark.parametrize(("spec", "name"), [(spec, ("square", "wide")[i % 2]) for i, spec in enumerate(ACTIVE)])
def test_batch_gives_the_codes_of_each_image_alone(spec: str, name: str):
    subject, policy = toy(name), load_policy(spec)
    batch = cached_run(spec, name)
    for image, (seed, length) in enumerate(zip(SEEDS, LENGTHS, strict=True)):
        alone = run(subject, policy, make_request(subject.schedule, [seed], [length]))
        assert alone.choices.keys() == batch.choices.keys()
        for scale in alone.choices:
            if not same_choice(alone, batch, image, scale, seed, subject.schedule):
                break
        else:
            assert torch.allclose(alone.f_hat[0], batch.f_hat[image], atol=1e-5)


def same_choice(alone: Result, batch: Result, image: int, scale: int, seed: int, schedule: ScaleSchedule) -> bool:
    """Whether the codes agree; fails if they differ by more than a tie within float error."""
    one, many = alone.choices[scale], batch.choices[scale]
    num_tokens = schedule.scales[scale].num_tokens
    positions = one.positions(0, num_tokens)
    assert positions == many.positions(image, num_tokens)
    if not same_weights(alone, batch, image, scale, schedule):
        return False
    assert torch.allclose(one.logits[0], many.logits[image], atol=1e-3)
    differ = (one.symbols[0] != many.symbols[image]).nonzero().tolist()
    num_bits = one.symbols[0].shape[-1]
    u = draw(seed, scale, num_tokens * num_bits)
    for i, bit in differ:
        p = float(one.logits[0][i, bit].softmax(-1)[1])
        assert abs(p - u[positions[i] * num_bits + bit]) < 1e-4
    return not differ


def same_weights(alone: Result, batch: Result, image: int, scale: int, schedule: ScaleSchedule) -> bool:
    """Whether each token has the same score; fails if scores went to tokens whose changes differ by more than a tie.

    Enlarging a grid of one or two rows makes many tokens that tie within float error.
    """
    scores = [alone.bound.plans[scale].weight_Bl, batch.bound.plans[scale].weight_Bl]
    if scores[0] is None or torch.equal(scores[0][0], scores[1][image]):
        return True
    signals = alone.bound.signals[scale]
    one, many = (sum(part.values.values()) for part in (signals, batch.bound.signals[scale]))
    assert torch.allclose(one[0], many[image], rtol=1e-4)
    change_11hw = one.unflatten(-1, signals.grid)[None]
    change_l = F.interpolate(change_11hw, size=schedule.grids[scale], mode="bilinear").flatten()
    for score in scores[0].unique():
        one, many = (change_l[part == score].sort().values for part in (scores[0][0], scores[1][image]))
        assert torch.allclose(one, many, rtol=1e-4)
    return False


@pytest.mark.parametrize(("spec", "name"), IN_TURN)
def test_draws_do_not_depend_on_what_was_skipped(spec: str, name: str):
    """Every bit is u < p with the draw of its place in the whole map, wherever tokens or scales were left out."""
    subject, result = toy(name), cached_run(spec, name)
    assert_keyed(result, subject.schedule)


def test_draws_count_skipped_scales():
    plans = [ScalePlan(), ScalePlan(), ScalePlan(runs=False), ScalePlan(), ScalePlan()]
    result = run(toy("square"), FixedBound(plans))
    assert sorted(result.choices) == [0, 1, 3, 4]
    assert torch.equal(result.f_hats[2], result.f_hats[1])
    assert_keyed(result, toy("square").schedule)


def assert_keyed(result: Result, schedule: ScaleSchedule, seeds: Sequence[int] = SEEDS):
    for scale, choice in result.choices.items():
        num_tokens = schedule.scales[scale].num_tokens
        for image, (logits_kd2, bits_kd) in enumerate(zip(choice.logits, choice.symbols, strict=True)):
            num_bits = bits_kd.shape[-1]
            u_ld = torch.tensor(draw(seeds[image], scale, num_tokens * num_bits)).view(num_tokens, num_bits)
            u_kd = u_ld[choice.positions(image, num_tokens)]
            p_kd = logits_kd2.double().softmax(-1)[..., 1]
            is_clear = (u_kd - p_kd).abs() > 1e-6
            assert torch.equal((u_kd < p_kd)[is_clear], bits_kd.bool()[is_clear])


# 3. Nothing stays


def left_over() -> list[object]:
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, KVCache | RequestState | ScaleRun)]


def attributes(model: Infinity) -> list[dict[str, int]]:
    """Every attribute of every module: name and identity, and the version of every parameter and buffer."""
    found = []
    for module in model.modules():
        found.append({name: id(value) for name, value in vars(module).items()})
        tensors = [*module._parameters.items(), *module._buffers.items()]
        found.append({name: value._version for name, value in tensors if value is not None})
    return found


@pytest.mark.parametrize("spec", few(ACTIVE, *FIRST, more=0))
def test_broken_request_leaves_nothing(spec: str):
    """One request raises in the middle, one is cancelled; the next one runs as on a model that nobody used."""
    subject, policy = toy("wide"), load_policy(spec)
    fresh = run(subject, policy, model=copy.deepcopy(subject.model))
    assert_nothing_stays(subject, policy, make_request(subject.schedule), fresh)


def assert_nothing_stays(subject: Toy, policy: Policy, request: Request, fresh: Result):
    """Breaks one request, cancels one, and runs it a third time: nothing is left over, and the bits are the same."""
    before, others, last = attributes(subject.model), len(left_over()), max(fresh.choices)
    engine, bound = Engine(subject.model, subject.tokenizer), policy.bind(subject.schedule, subject.model.shape)
    with pytest.raises(RuntimeError, match="the toy broke"):
        list(engine.run(bound, with_sampler(request, SpySampler(inner=request.sampler, fails_at=last))))
    assert len(left_over()) == others
    steps = engine.run(bound, request)
    for _ in range(last):
        next(steps)
    assert len(left_over()) > others
    steps.close()
    assert len(left_over()) == others
    assert attributes(subject.model) == before
    assert vars(engine).keys() == {
        "model",
        "tokenizer",
        "graphs",
        "refiner",
        "obeys_autocast",
        "_narrowed",
        "uses_triton",
    }
    assert engine.graphs is engine.refiner is None
    assert same_bits(run(subject, bound, request), fresh)


def test_latents_handed_out_are_never_changed_later():
    subject = toy("square")
    request = make_request(subject.schedule)
    bound = REGISTRY["full"].neutral().bind(subject.schedule, subject.model.shape)
    held = []
    for step in Engine(subject.model, subject.tokenizer).run(bound, request):
        assert not torch.is_inference_mode_enabled()
        held.append((step.f_hat_BZHW, step.f_hat_BZHW.clone()))
    assert all(torch.equal(now, then) for now, then in held)


# 4. Costs


def total_after(trace: Trace) -> Cost:
    work = [scale.work for scale in trace.scales]
    return request_cost(work, trace.shape, trace.text_tokens, trace.bytes_per_element)


@pytest.mark.parametrize(("spec", "name"), sorted({*IN_TURN, *((spec, "square") for spec in ACTIVE)}))
def test_cost_is_known_before_and_counted_after(spec: str, name: str):
    subject, policy = toy(name), load_policy(spec)
    request = make_request(subject.schedule)
    bound = policy.bind(subject.schedule, subject.model.shape)
    before = forecast(bound, request, subject.model.shape)
    result = cached_run(spec, name)
    counted = total_after(result.trace)
    assert counted == result.trace.cost
    assert result.trace.peak_kv_bytes == bounds_of(bound, request, subject.model.shape).kv_bytes(64, 4)
    assert counted.tokens == sum(len(part) for choice in result.choices.values() for part in choice.symbols)
    if bound.is_static:
        assert before == counted
    else:
        assert before.flops >= counted.flops
        assert before.tokens >= counted.tokens
        assert before.kv_bytes >= counted.kv_bytes
    assert counted.flops <= full_cost(request, subject.model.shape).flops


@pytest.mark.parametrize("spec", ["full", "drop-branch:count=1", "ld-pruning:lhep=false,sats_threshold=0.0000001"])
def test_cost_is_known_where_some_scales_are_not_guided(spec: str):
    """An unguided scale fills the unconditional cache without a head, unless a policy reads those logits."""
    subject = toy("square")
    request = make_request(subject.schedule, weights=(1.0, 1.0, 3.0, 1.0, 3.0))
    bound = load_policy(spec).bind(subject.schedule, subject.model.shape)
    before, trace = forecast(bound, request, subject.model.shape), run(subject, bound, request).trace
    assert before == trace.cost
    heads = [scale.work.rows[(1, False)].head_tokens for scale in trace.scales[:4]]
    assert heads == ([1, 4, 16, 36] if "sats" in spec else [0, 0, 16, 0])


def test_policies_that_look_at_content_say_so():
    schedule, shape = toy("square").schedule, toy("square").model.shape
    static = {name: policy().bind(schedule, shape).is_static for name, policy in REGISTRY.items()}
    assert [name for name, is_static in static.items() if not is_static] == ["ld-pruning", "sparsevar", "skipvar"]
    assert load_policy("ld-pruning:energy_share=1,sats=false").bind(schedule, shape).is_static


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    "case",
    few(
        [*(f"{spec} on wide" for spec in ACTIVE), "ld-pruning|depthvar on patches"],
        *(f"{spec} on wide" for spec in ("full", "ld-pruning", "depthvar", "fastvar:skip_last=1,reference_scale=-4")),
        *("cached-guidance:count=2,keep_ratio=0.3 on wide", "sparsevar:threshold=0.995,stride=3 on wide"),
        *("kv-eviction:keep_first=1,window=1 on wide", "skipvar on wide", "ld-pruning|depthvar on patches"),
        more=2,
    ),
)
def test_flops_agree_with_those_that_torch_counts(case: str, monkeypatch: pytest.MonkeyPatch):
    """Exactly, but for the resizing of what is kept, which contracts leave out and torch sees as matrix products.

    A single row is computed as two; the second one is no useful work and is not counted.
    """
    monkeypatch.setattr("foveate.kernels.linear.LEAST_ROWS", 1)
    spec, name = case.split(" on ")
    subject = toy(name)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with counter:
        result = run(subject, load_policy(spec), make_request(subject.schedule, SEEDS[:1], LENGTHS[:1]))
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    counted = counter.get_total_flops() - convolutions
    assert counted - resize_flops(result, subject.schedule) == result.trace.cost.flops


def resize_flops(result: Result, schedule: ScaleSchedule) -> int:
    """FLOPs of the two small matrices that enlarge the deltas of every block, at every use."""
    flops, stored, difference = 0, None, None
    for trace, plan in zip(result.trace.scales, result.bound.plans, strict=True):
        if not trace.ran:
            continue
        (h, w), width = trace.grid, 64
        shape = trace.work
        is_kept = KeepOutputs() in result.bound.keeps(trace.scale)
        if difference is not None and plan.difference is not None and difference != (h, w):
            y, x = difference
            flops += 2 * 2 * LATENT_CHANNELS * schedule.patch**2 * (h * y * x + w * x * h)
        if KeepDifference() in result.bound.keeps(trace.scale):
            difference = (h, w)
        is_pruned = any(row.head_tokens < shape.grid_tokens for row in shape.rows.values() if row.head_tokens)
        for block in range(5):
            if stored is None or stored == (h, w):
                continue
            is_partial = any(row.block_tokens[block] < row.head_tokens for row in shape.rows.values())
            uses = int(plan.fill is not None and is_partial)
            uses += int(is_pruned and (is_kept or bool(result.bound.record(trace.scale) - set(Signal))))
            y, x = stored
            flops += uses * 2 * len(shape.rows) * width * (h * y * x + w * x * h)
        if is_kept:
            stored = (h, w)
    return flops


def held_bytes(others: list[int]) -> int:
    caches = [x for x in gc.get_objects() if isinstance(x, KVCache) and id(x) not in others]
    return sum(cache.num_bytes for cache in caches)


@pytest.mark.parametrize(
    "spec", few(ACTIVE, "full", "ld-pruning", "drop-branch:count=3", "kv-eviction:keep_first=1,window=1", more=1)
)
def test_cache_bound_is_known_before_and_never_exceeded(spec: str):
    """Of what is really held; that the bound is the peak that a trace tells is asked of every setting above."""
    subject, policy = toy("wide"), load_policy(spec)
    request = make_request(subject.schedule)
    bound = policy.bind(subject.schedule, subject.model.shape)
    limit = bounds_of(bound, request, subject.model.shape).kv_bytes(subject.model.shape.width, 4)
    gc.collect()
    others = [id(x) for x in gc.get_objects() if isinstance(x, KVCache)]
    held = []
    for step in Engine(subject.model, subject.tokenizer).run(bound, request):
        held.append(held_bytes(others))
        peak = step.trace.peak_kv_bytes
    assert peak == limit
    assert max(held) <= limit
    assert held == sorted(held, reverse=True)
    if Directive.BRANCH in bound.directives and Directive.BRANCH in step.trace.fired():
        assert held[-1] < limit


def test_negative_prompts_cost_nothing_without_guidance():
    subject = toy("square")
    negatives = [text_features(50, 4)] * 3
    plain = run(subject, load_policy("full"), make_request(subject.schedule, weights=(1.0,) * 5))
    request = make_request(subject.schedule, weights=(1.0,) * 5, negatives=negatives)
    result = run(subject, load_policy("full"), request)
    assert same_bits(result, plain)
    assert result.trace.cost == plain.trace.cost
    limit = bounds_of(load_policy("full").bind(subject.schedule, subject.model.shape), request, subject.model.shape)
    assert limit.kv_bytes(64, 4) == result.trace.peak_kv_bytes


# 5. Promises and refusals


@pytest.mark.parametrize(
    ("spec", "unfired"),
    [
        ("full", ()),
        ("ld-pruning:sats_threshold=0.0000000001", ("stop the unconditional branch",)),
        ("ld-pruning:sats_threshold=1000", ()),
        ("drop-branch", ()),
        ("skip-scales|random-tokens:num_scales=1", ("drop tokens",)),
        ("skip-scales|depthvar:reference_scale=3", ("skip blocks",)),
    ],
)
def test_promise_that_never_came_true_is_reported(spec: str, unfired: tuple[str, ...]):
    assert cached_run(spec, "square").trace.unfired == unfired


def test_branch_promise_without_guidance_is_reported():
    subject = toy("square")
    result = run(subject, load_policy("drop-branch"), make_request(subject.schedule, weights=(1.0,) * 5))
    assert result.trace.unfired == ("stop the unconditional branch",)


@pytest.mark.parametrize("later", [None, (True,), (False, True, False)])
def test_dropped_branch_cannot_return(later: tuple[bool, ...] | None):
    dropped = ScalePlan(unconditional=(False,))
    plans = [ScalePlan(), ScalePlan(), dropped, ScalePlan(unconditional=later), ScalePlan(unconditional=later)]
    with pytest.raises(ValueError, match="scale 3: a dropped unconditional branch cannot return, image [01]"):
        run(toy("square"), FixedBound(plans))


def test_branch_of_one_image_stops_and_the_others_go_on():
    one = ScalePlan(unconditional=(True, False, True))
    result = run(toy("square"), FixedBound([ScalePlan(), ScalePlan(), one, one, one]))
    rows = [sorted(scale.work.rows) for scale in result.trace.scales]
    assert [(1, False) in r for r in rows] == [True, True, False, False, False]
    assert all((0, False) in r and (2, False) in r for r in rows)
    full = cached_run("full", "square")
    for image, is_same in ((0, True), (1, False), (2, True)):
        assert torch.equal(full.choices[4].symbols[image], result.choices[4].symbols[image]) == is_same


def test_stopping_rule_is_refused_where_branches_are_mixed_inside():
    subject = toy("square")
    request = make_request(subject.schedule, hidden_blocks=(3,))
    with pytest.raises(ValueError, match="cannot decide when to stop"):
        run(subject, load_policy("ld-pruning"), request)
    assert run(subject, load_policy("ld-pruning:sats=false"), request).trace.scales


def test_guidance_weight_one_keeps_the_branch_only_as_long_as_it_is_needed():
    subject = toy("square")
    request = make_request(subject.schedule, weights=(1.0, 1.0, 3.0, 1.0, 1.0))
    result = run(subject, load_policy("full"), request)
    has_branch = [(0, False) in scale.work.rows for scale in result.trace.scales]
    assert has_branch == [True, True, True, False, False]
    assert [scale.work.rows[(0, False)].head_tokens for scale in result.trace.scales[:3]] == [0, 0, 16]


def test_content_decides_for_each_image_by_itself():
    result = cached_run("ld-pruning:sats=false", "square")
    kept = [len(part) for part in result.choices[4].symbols]
    assert len(set(kept)) > 1
    assert all(0 < count < 64 for count in kept)


class Greedy(Bound):
    """Notes whether anybody else's signals reach it."""

    def plan(self, scale, signals, state):
        if signals is not None:
            assert signals.residual_BZhw is None
            assert signals.logits is None
            assert signals.f_hat_BZHW is None
            assert not signals.values
        return ScalePlan(), state


def test_nothing_is_recorded_unasked():
    assert run(toy("square"), Greedy()).trace.scales


def test_policies_hold_no_state_between_requests():
    """One bound policy serves two requests that run at the same time, scale by scale."""
    subject = toy("square")
    bound = load_policy("ld-pruning:sats_threshold=0.3|depthvar").bind(subject.schedule, subject.model.shape)
    engine = Engine(subject.model, subject.tokenizer)
    requests = [make_request(subject.schedule, [seed], [5]) for seed in (3, 7)]
    alone = [[step.f_hat_BZHW for step in engine.run(bound, request)] for request in requests]
    woven: list[Iterator] = [engine.run(bound, request) for request in requests]
    for scale, steps in enumerate(zip(*woven, strict=True)):
        for i, step in enumerate(steps):
            assert torch.equal(step.f_hat_BZHW, alone[i][scale])


def test_seed_beyond_32_bits_and_scale_key_draw_differently():
    subject = toy("square")
    results = [
        run(subject, load_policy("full"), make_request(subject.schedule, [3], [5], sampler=KeyedSampler(seeds=(seed,))))
        for seed in (3, 3 + 2**40)
    ]
    assert not same_bits(*results)


def test_every_policy_class_is_final_and_its_neutral_is_its_own_kind():
    for policy in REGISTRY.values():
        assert isinstance(policy.neutral(), policy)
        assert Policy in policy.__bases__
