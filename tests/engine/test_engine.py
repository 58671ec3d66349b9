"""The parts of the engine against slow twins: execution of plans, cache, packing, deltas, guidance, counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.cost import ModelShape
from foveate.core.plan import DepthMap, Rule, ScalePlan, TokenSelection
from foveate.core.rows import Rows
from foveate.core.schedule import Scale
from foveate.core.trace import Trace
from foveate.engine.branches import combine_hidden, combine_logits
from foveate.engine.deltas import DeltaStore
from foveate.engine.executor import Engine
from foveate.engine.kv_cache import KVCache
from foveate.engine.select import TokenLayout, choose
from foveate.engine.tally import Tally
from foveate.policies.registry import load_policy
from tests.engine.naive import attend_list, decisions_of, generate_planned
from tests.toys import (
    LENGTHS,
    SEEDS,
    FixedBound,
    SpySampler,
    cached_run,
    make_request,
    run,
    text_features,
    toy,
    with_sampler,
)

SHAPE = ModelShape(num_blocks=2, width=8, ff_width=16, num_heads=2, head_width=4, head_outputs=4, input_channels=2)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lay_out(plan: ScalePlan, live: list[tuple[int, bool]], num_images: int, num_tokens: int) -> TokenLayout:
    """The layout of a plan, of as many blocks as its depths know."""
    num_blocks = len(plan.depths[0].order) if plan.depths else 1
    return TokenLayout.of(choose(plan, num_images, num_tokens, num_blocks), live, num_tokens)


# Plans are executed as decided


@pytest.mark.parametrize("name", ["wide", "patches", "odd"])
@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "ld-pruning",
        "ld-pruning:fill=zero,sats_threshold=1000",
        "depthvar:reference_scale=2",
        "depthvar:fill=identity,order=prefix,curve=linear",
        "random-tokens:keep_ratio=0.4|drop-branch:count=2",
        "uniform-depth",
        "ld-pruning|depthvar",
        "skip-scales|random-tokens:keep_ratio=0.6|uniform-depth:num_scales=2|drop-branch:count=3",
    ],
)
def test_plans_run_as_decided(spec: str, name: str):
    """A run of three images equals each image computed alone, row by row, from lists of tokens."""
    subject, result = toy(name), cached_run(spec, name)
    request = make_request(subject.schedule)
    for image in (1, 2) if name == "wide" else (1,):
        text = text_features(SEEDS[image], LENGTHS[image])
        page = generate_planned(subject, text, SEEDS[image], decisions_of(result, image), request)
        for ours, theirs in zip(result.f_hats, page.f_hats, strict=True):
            assert torch.allclose(ours[image], theirs[0], atol=1e-4)


def test_maps_in_the_trace_add_up_to_the_counts():
    result = cached_run("ld-pruning|depthvar", "odd")
    for scale in result.trace.scales:
        for image in range(3):
            row = scale.work.rows[(image, True)]
            assert int(scale.keep_Bl[image].sum()) == row.head_tokens
            assert int(scale.depth_Bl[image].sum()) == sum(row.block_tokens)
            assert not scale.depth_Bl[image][~scale.keep_Bl[image]].any()
    pruned = result.trace.scales[-1]
    assert int(pruned.keep_Bl.sum()) < pruned.keep_Bl.numel()


def test_maps_are_kept_only_if_asked_for():
    subject = toy("odd")
    result = run(subject, load_policy("ld-pruning"), make_request(subject.schedule, wants_maps=False))
    assert all(scale.keep_Bl is None and scale.depth_Bl is None for scale in result.trace.scales)


def test_depth_of_nobody_runs_no_block():
    order = tuple(range(5))
    plans = [ScalePlan()] * 4 + [ScalePlan(depths=(DepthMap(depth_Bl=torch.zeros(1, 64).long(), order=order),))]
    result = run(toy("square"), FixedBound(plans))
    row = result.trace.scales[4].work.rows[(0, True)]
    assert row.block_tokens == (0,) * 5
    assert row.head_tokens == 64


def test_a_selection_that_keeps_all_takes_the_dense_path():
    selection = TokenSelection(score_Bl=noise(0, 1, 64), share=1.0, rule=Rule.COUNT)
    layout = lay_out(ScalePlan(selections=(selection,)), [(0, True), (0, False)], 1, 64)
    assert layout.kept is None
    assert layout.keep_Bl is None
    full = tuple(range(5))
    deep = DepthMap(depth_Bl=torch.full((1, 64), 5), order=full)
    layout = lay_out(ScalePlan(depths=(deep,)), [(0, True), (0, False)], 1, 64)
    assert all(layout.active(block).index_n is None for block in full)


def test_packing_gathers_each_image_in_both_branches():
    score_Bl = torch.tensor([[4.0, 1.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    selection = TokenSelection(score_Bl=score_Bl, share=0.5, rule=Rule.COUNT)
    live = [(0, True), (1, True), (1, False)]
    depth = DepthMap(depth_Bl=torch.tensor([[0, 2, 2, 0], [0, 0, 1, 2]]), order=(1, 0))
    layout = lay_out(ScalePlan(selections=(selection,), depths=(depth,)), live, 2, 4)
    packed = layout.pack([torch.arange(4), torch.arange(10, 14)])
    assert packed.tolist() == [0, 2, 12, 13, 12, 13]
    active = layout.active(0)
    assert active.rows.counts == (1, 1, 1)
    assert active.index_n.tolist() == [1, 3, 5]


# Rows


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=6), keys=st.data())
def test_rows_group_neighbours_that_agree(counts: list[int], keys: st.DataObject):
    tags = tuple(keys.draw(st.lists(st.integers(0, 1), min_size=len(counts), max_size=len(counts))))
    groups = Rows(tuple(counts)).groups(tags)
    assert [r for a, b in groups for r in range(a, b)] == list(range(len(counts)))
    for a, b in groups:
        assert len({(counts[r], tags[r]) for r in range(a, b)}) == 1
        assert b == len(counts) or (counts[b], tags[b]) != (counts[a], tags[a])


@pytest.mark.parametrize("counts", [(3,), (2, 2, 2), (1, 3, 0)])
def test_spread_repeats_a_vector_for_each_token(counts: tuple[int, ...]):
    vectors = noise(1, len(counts), 5)
    expected = [vectors[r] for r, n in enumerate(counts) for _ in range(n)]
    assert torch.equal(Rows(counts).spread(vectors), torch.stack(expected))


# Cache


def test_cache_equals_growing_lists():
    """Rows of different lengths, rows that add nothing, rows that are released, and a last scale that is not stored."""
    cache = KVCache(SHAPE, 3, (9, 0), 4, torch.float32, torch.device("cpu"))
    past: list[list[torch.Tensor]] = [[], [], []]
    rows_alive = [0, 1, 2]
    for step, counts in enumerate([(1, 1, 1), (2, 4, 0), (3, 3, 3), (2, 1)]):
        if len(counts) < len(rows_alive):
            rows_alive = [0, 2]
            cache.keep([0, 2])
        q, k, v = (noise(10 * step + i, sum(counts), 2, 4) for i in range(3))
        slot = cache.slot(0, Rows(counts), is_stored=step < 3)
        ours = slot.attend(q, k, v, 0.7).split(counts)
        parts = [x.split(counts) for x in (q, k, v)]
        for i, row in enumerate(rows_alive):
            held = past[row] if step < 3 else list(past[row])
            if counts[i]:
                theirs = attend_list(held, *(part[i] for part in parts), 0.7)
                assert torch.allclose(ours[i], theirs, atol=1e-5)
    assert cache.lengths[0] == [len(past[0][0]), len(past[2][0])]


def test_cache_allocates_the_bound_once():
    cache = KVCache(SHAPE, 3, (9, 5), 4, torch.bfloat16, torch.device("cpu"))
    assert cache.num_bytes == 2 * 2 * 3 * 8 * (9 + 5 + 9 + 4)
    before = [t.data_ptr() for t in (*cache.k_RNMD, *cache.v_RNMD)]
    values = noise(0, 9, 2, 4).bfloat16()
    for block in (0, 1):
        cache.slot(block, Rows((3, 3, 3)), is_stored=True).attend(values, values, values, 1.0)
    assert [t.data_ptr() for t in (*cache.k_RNMD, *cache.v_RNMD)] == before
    cache.keep([1])
    assert cache.num_bytes == 2 * 2 * 8 * (9 + 5 + 9 + 4)


# Deltas


def test_store_holds_nothing_before_it_was_filled_and_keeps_rows():
    store = DeltaStore(2)
    assert store.resized(0, (4, 4)) is None
    store.keep([1])
    store.blocks, store.grid = [noise(0, 3, 4, 2), noise(1, 3, 4, 2)], (2, 2)
    middle = store.blocks[1][1]
    store.keep([1])
    assert torch.equal(store.resized(1, (2, 2)), middle[None])


# Guidance


def test_guidance_is_the_weighted_difference_over_the_temperature():
    cond, uncond = noise(0, 3, 4), noise(1, 3, 4)
    logits = {(0, True): cond, (1, True): cond + 1, (0, False): uncond}
    first, second = combine_logits(logits, 2.5, 0.5)
    assert torch.allclose(first, (uncond + 2.5 * (cond - uncond)) / 0.5, atol=1e-5)
    assert torch.allclose(second, (cond + 1) / 0.5)
    plain, _ = combine_logits(logits, 1.0, 2.0)
    assert torch.equal(plain, cond * 0.5)


def test_hidden_states_of_both_branches_become_their_combination():
    x = noise(0, 5, 3)
    live, rows = [(0, True), (1, True), (0, False)], Rows((2, 1, 2))
    mixed = combine_hidden(x, live, rows, 3.0)
    assert torch.allclose(mixed[:2], x[3:] + 3 * (x[:2] - x[3:]), atol=1e-5)
    assert torch.equal(mixed[:2], mixed[3:])
    assert torch.equal(mixed[2], x[2])
    assert torch.equal(combine_hidden(x, live, rows, 1.0), x)


def test_guidance_inside_the_blocks_changes_the_picture():
    subject = toy("square")
    inside = run(subject, load_policy("full"), make_request(subject.schedule, hidden_blocks=(3,)))
    outside = cached_run("full", "square")
    assert not torch.equal(inside.f_hat, outside.f_hat)


# Counting


def test_tally_counts_what_ran():
    score_Bl = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
    plan = ScalePlan(
        selections=(TokenSelection(score_Bl=score_Bl, share=0.75, rule=Rule.COUNT),),
        depths=(DepthMap(depth_Bl=torch.tensor([[2, 2, 1, 0]]), order=(1, 0)),),
    )
    layout = lay_out(plan, [(0, True)], 1, 4)
    tally = Tally.start(layout, True, torch.device("cpu"))
    tally.count()
    trace = tally.trace(Scale(index=2, grid=(2, 2)), {(0, True): 3})
    assert trace.work.rows[(0, True)].block_tokens == (2, 3)
    assert trace.keep_Bl.tolist() == [[True, True, True, False]]
    assert trace.depth_Bl.tolist() == [[2, 2, 1, 0]]


def test_trace_survives_json():
    trace = cached_run("ld-pruning:skip_last=1,sats_threshold=1000", "wide").trace
    again = Trace.from_json(trace.to_json())
    assert again.cost == trace.cost
    assert again.dumps() == trace.dumps()
    assert again.fired() == trace.fired()
    assert [s.grid for s in again.scales] == list(toy("wide").schedule.grids)


def test_steps_come_one_per_scale_and_the_trace_grows():
    subject = toy("square")
    request = make_request(subject.schedule)
    bound = load_policy("skip-scales").bind(subject.schedule, subject.model.shape)
    spy = SpySampler(inner=request.sampler)
    seen = [
        (step.scale, len(step.trace.scales), len(spy.choices))
        for step in Engine(subject.model, subject.tokenizer).run(bound, with_sampler(request, spy))
    ]
    assert seen == [(0, 1, 1), (1, 2, 2), (2, 3, 3), (3, 4, 4), (4, 5, 4)]


def test_model_sees_each_prompt_and_level():
    """Another prompt, another prompt length, another seed: each changes the picture."""
    subject = toy("square")
    base = run(subject, load_policy("full"), make_request(subject.schedule, [3], [5])).f_hat
    for seed, length, key in ((4, 5, 3), (3, 6, 3), (3, 5, 4)):
        request = make_request(subject.schedule, [seed], [length])
        request = with_sampler(request, type(request.sampler)(seeds=(key,)))
        assert not torch.equal(run(subject, load_policy("full"), request).f_hat, base)
