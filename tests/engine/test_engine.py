"""The parts of the engine against slow twins: execution of plans, cache, packing, deltas, guidance, counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.cost import ModelShape
from foveate.core.plan import CachedFill, DepthMap, Resize, ScalePlan
from foveate.core.rows import Rows
from foveate.core.schedule import ScaleSchedule
from foveate.core.selection import MaskSelection, Rule, TokenSelection
from foveate.core.signals import BranchLogits
from foveate.core.trace import Trace
from foveate.engine.branches import combine_hidden_, combine_logits, per_image
from foveate.engine.counting import trace_of
from foveate.engine.executor import Engine
from foveate.engine.fills import Fills
from foveate.engine.kv_cache import KVCache, Slot
from foveate.engine.scale_run import ScaleRun
from foveate.policies.registry import load_policy
from tests.engine.naive import attend_list, decisions_of, generate_planned
from tests.randomness import normal
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
    return normal(*shape, stream=seed)


def begin(plan: ScalePlan, grid: tuple[int, int] = (8, 8), num_images: int = 1) -> ScaleRun:
    """The run of a plan at the last of two scales, on the model of a toy."""
    subject = toy("square")
    schedule = ScaleSchedule.from_grids([(1, 1), grid])
    request = make_request(schedule, SEEDS[:num_images], LENGTHS[:num_images], weights=(2.0, 2.0))
    engine = Engine(subject.model, subject.tokenizer)
    state = engine.open(FixedBound([ScalePlan(), plan]), request)
    engine.step([state])
    return ScaleRun.begin(state, subject.model)


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
    ran = begin(ScalePlan(selections=(selection,)))
    assert ran.is_dense
    assert ran.committed() is None
    order = tuple(range(5))
    ran = begin(ScalePlan(depths=(DepthMap(depth_Bl=torch.full((1, 64), 5), order=order),)))
    assert all(ran.active(block).index_n is None for block in order)


def test_packing_gathers_each_image_in_both_branches():
    score_Bl = torch.tensor([[4.0, 1.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    selection = TokenSelection(score_Bl=score_Bl, share=0.5, rule=Rule.COUNT)
    depth = DepthMap(depth_Bl=torch.tensor([[0, 2, 2, 0], [0, 0, 1, 2]]), order=(1, 0, 2, 3, 4))
    plan = ScalePlan(selections=(selection,), depths=(depth,), unconditional=(False, True))
    ran = begin(plan, (2, 2), 2)
    assert ran.live == ((0, True), (1, True), (1, False))
    assert ran.pack([torch.arange(4), torch.arange(10, 14)]).tolist() == [0, 2, 12, 13, 12, 13]
    active = ran.active(0)
    assert active.rows.counts == (1, 1, 1)
    assert active.index_n.tolist() == [1, 3, 5]


def test_the_unconditional_branch_may_run_fewer_tokens():
    mask_Bl = torch.tensor([[True, False, False, True]])
    plan = ScalePlan(
        selections=(TokenSelection(score_Bl=torch.tensor([[4.0, 1.0, 3.0, 2.0]]), share=0.75, rule=Rule.COUNT),),
        unconditional_tokens=(MaskSelection(mask_Bl=mask_Bl, kept=2),),
    )
    ran = begin(plan, (2, 2))
    assert ran.rows.counts == (3, 2)
    assert ran.pack([torch.arange(4)]).tolist() == [0, 2, 3, 0, 3]
    (image,) = per_image(ran, torch.arange(5.0)[:, None])
    assert image.uncond_index_u.tolist() == [0, 2]
    assert [part.flatten().tolist() for part in image.both()] == [[0.0, 2.0], [3.0, 4.0]]


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
        rows = Rows(counts)
        slot = Slot(cache, 0, rows, range(len(counts)), is_stored=step < 3, wants_entropy=False)
        ours = slot.attend(q, k, v, 0.7).split(counts)
        parts = [x.split(counts) for x in (q, k, v)]
        for i, row in enumerate(rows_alive):
            held = past[row] if step < 3 else list(past[row])
            if counts[i]:
                theirs = attend_list(held, *(part[i] for part in parts), 0.7)
                assert torch.allclose(ours[i], theirs, atol=1e-5)
        if step < 3:
            cache.commit(step, [counts, [0] * len(counts)])
    assert cache.lengths[0] == [len(past[0][0]), len(past[2][0])]


def test_cache_allocates_the_bound_once():
    cache = KVCache(SHAPE, 3, (9, 5), 4, torch.bfloat16, torch.device("cpu"))
    assert cache.num_bytes == 2 * 2 * 3 * 8 * (9 + 5 + 9 + 4)
    before = [t.data_ptr() for t in (*cache.k_RNMD, *cache.v_RNMD)]
    values = noise(0, 9, 2, 4).bfloat16()
    for block in (0, 1):
        slot = Slot(cache, block, Rows((3, 3, 3)), (0, 1, 2), is_stored=True, wants_entropy=False)
        slot.attend(values, values, values, 1.0)
    assert [t.data_ptr() for t in (*cache.k_RNMD, *cache.v_RNMD)] == before
    cache.keep([1])
    assert cache.num_bytes == 2 * 2 * 8 * (9 + 5 + 9 + 4)


def test_what_a_scale_writes_counts_only_when_it_is_committed():
    cache = KVCache(SHAPE, 2, (6, 6), 4, torch.float32, torch.device("cpu"))
    q, k, v = (noise(i, 4, 2, 4) for i in range(3))
    outs = []
    for _ in range(2):
        slot = Slot(cache, 0, Rows((2, 2)), (0, 1), is_stored=True, wants_entropy=False)
        outs.append(slot.attend(q, k, v, 1.0))
    assert cache.lengths == [[0, 0], [0, 0]]
    assert torch.equal(*outs)


def test_evicted_scales_are_gone_and_later_ones_move_up():
    """Rows of different lengths; what is left is what a list without that scale holds."""
    cache = KVCache(SHAPE, 2, (12, 12), 4, torch.float32, torch.device("cpu"))
    past: list[dict[int, list[torch.Tensor]]] = [{}, {}]
    for step, counts in enumerate([(1, 1), (2, 3), (3, 2)]):
        k, v = noise(step, sum(counts), 2, 4), noise(9 + step, sum(counts), 2, 4)
        slot = Slot(cache, 0, Rows(counts), (0, 1), is_stored=True, wants_entropy=False)
        slot.attend(k, k, v, 1.0)
        cache.commit(step, [counts, (0, 0)])
        for row, parts in enumerate(zip(k.split(counts), v.split(counts), strict=True)):
            past[row][step] = list(parts)
    assert cache.evict(1)
    assert not cache.evict(1)
    assert cache.lengths[0] == [4, 3]
    for row in range(2):
        for stored, place in ((cache.k_RNMD, 0), (cache.v_RNMD, 1)):
            expected = torch.cat([past[row][0][place], past[row][2][place]])
            assert torch.equal(stored[0][row][:, : cache.lengths[0][row]].transpose(0, 1), expected)


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_narrower_dtype_reads_what_was_stored_and_stores_what_later_scales_read(is_stored: bool):
    cache = KVCache(SHAPE, 1, (6, 6), 4, torch.float32, torch.device("cpu"))
    first, second = noise(0, 2, 2, 4), noise(1, 3, 2, 4)
    Slot(cache, 0, Rows((2,)), (0,), is_stored=True, wants_entropy=False).attend(first, first, first, 1.0)
    cache.commit(0, [[2], [2]])
    half = second.bfloat16()
    out = Slot(cache, 0, Rows((3,)), (0,), is_stored=is_stored, wants_entropy=False).attend(half, half, half, 1.0)
    both = torch.cat((first, half.float()))
    weights = torch.einsum("qnd,knd->nqk", half.float(), both).softmax(-1)
    assert out.dtype is torch.bfloat16
    assert torch.allclose(out.float(), torch.einsum("nqk,knd->qnd", weights, both), atol=0.05)
    assert torch.equal(cache.k_RNMD[0][0, :, :2].transpose(0, 1), first)
    if is_stored:
        assert torch.equal(cache.k_RNMD[0][0, :, 2:5].transpose(0, 1), half.float())


# Fills


def test_fills_hold_nothing_before_a_scale_was_kept_and_give_rows():
    assert Fills().resized((0, None), CachedFill(), (4, 4)) is None
    fills = Fills(scale=2, grid=(2, 2), outputs={(0, None): noise(0, 3, 4, 2), (1, 2): noise(1, 3, 4, 2)})
    part = fills.of_rows([1])
    assert torch.equal(part.resized((1, 2), CachedFill(source=2), (2, 2)), fills.outputs[(1, 2)][1:2])
    with pytest.raises(ValueError, match="reads scale 1, but scale 2 is kept"):
        fills.resized((0, None), CachedFill(source=1), (4, 4))


@pytest.mark.parametrize("resize", list(Resize))
def test_fills_come_to_a_later_grid(resize: Resize):
    """Every way to resize, value by value."""
    stored = noise(3, 2, 6, 3)
    fills = Fills(scale=0, grid=(2, 3), outputs={(0, None): stored})
    found = fills.resized((0, None), CachedFill(resize=resize), (5, 4))
    x_nC = noise(4, 40, 3)
    added = x_nC.clone()
    fills.add_resized_((0, None), CachedFill(resize=resize), (5, 4), added)
    assert torch.allclose(added, x_nC + found.flatten(0, 1), atol=1e-6)
    for y in range(5):
        for x in range(4):
            expected = torch.zeros(2, 3)
            for (row, column), share in shares(resize, y, x).items():
                expected += share * stored[:, row * 3 + column]
            assert torch.allclose(found[:, y * 4 + x], expected, atol=1e-5)


def shares(resize: Resize, y: int, x: int) -> dict[tuple[int, int], float]:
    """How much each of 2 x 3 places counts at a place of 5 x 4."""
    if resize is Resize.NEAREST:
        return {(y * 2 // 5, x * 3 // 4): 1.0}
    if resize is Resize.AREA:
        rows = range(y * 2 // 5, -(-(y + 1) * 2 // 5))
        columns = range(x * 3 // 4, -(-(x + 1) * 3 // 4))
        return {(r, c): 1 / (len(rows) * len(columns)) for r in rows for c in columns}
    found: dict[tuple[int, int], float] = {}
    for r, a in axis(y, 5, 2).items():
        for c, b in axis(x, 4, 3).items():
            found[(r, c)] = a * b
    return found


def axis(place: int, size: int, source: int) -> dict[int, float]:
    """Bilinear weights along one axis."""
    at = max((place + 0.5) * source / size - 0.5, 0.0)
    low = min(int(at), source - 1)
    share = at - low if low + 1 < source else 0.0
    return {low: 1 - share} | ({low + 1: share} if share else {})


# Guidance


def test_guidance_is_the_weighted_difference_over_the_temperature():
    cond, uncond = noise(0, 3, 4), noise(1, 3, 4)
    part = torch.tensor([0, 2])
    logits = [
        BranchLogits(cond_kV=cond, uncond_kV=uncond),
        BranchLogits(cond_kV=cond + 1),
        BranchLogits(cond_kV=cond, uncond_kV=uncond[part], uncond_index_u=part),
    ]
    first, second, third = combine_logits(logits, 2.5, 0.5)
    assert torch.allclose(first, (uncond + 2.5 * (cond - uncond)) / 0.5, atol=1e-5)
    assert torch.allclose(second, (cond + 1) / 0.5)
    assert torch.equal(third[part], first[part])
    assert torch.allclose(third[1], cond[1] / 0.5)
    assert torch.equal(combine_logits(logits, 1.0, 2.0)[0], cond * 0.5)


def test_hidden_states_of_both_branches_become_their_combination():
    x = noise(0, 5, 3)
    live, rows = [(0, True), (1, True), (0, False)], Rows((2, 1, 2))
    mixed = x.clone()
    combine_hidden_(mixed, live, rows, 3.0)
    assert torch.allclose(mixed[:2], x[3:] + 3 * (x[:2] - x[3:]), atol=1e-5)
    assert torch.equal(mixed[:2], mixed[3:])
    assert torch.equal(mixed[2], x[2])
    same = x.clone()
    combine_hidden_(same, live, rows, 1.0)
    assert torch.equal(same, x)


def test_guidance_inside_the_blocks_changes_the_picture():
    subject = toy("square")
    inside = run(subject, load_policy("full"), make_request(subject.schedule, hidden_blocks=(3,)))
    outside = cached_run("full", "square")
    assert not torch.equal(inside.f_hat, outside.f_hat)


# Counting


def test_the_trace_counts_what_ran():
    plan = ScalePlan(
        selections=(TokenSelection(score_Bl=torch.tensor([[4.0, 1.0, 3.0, 0.0]]), share=0.75, rule=Rule.COUNT),),
        depths=(DepthMap(depth_Bl=torch.tensor([[2, 2, 1, 0]]), order=(1, 0, 2, 3, 4)),),
    )
    trace = trace_of(begin(plan, (2, 2)), {})
    assert trace.work.rows[(0, True)].block_tokens == (2, 3, 0, 0, 0)
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
    """Another prompt, another prompt length, another seed: each changes the image."""
    subject = toy("square")
    base = run(subject, load_policy("full"), make_request(subject.schedule, [3], [5])).f_hat
    for seed, length, key in ((4, 5, 3), (3, 6, 3), (3, 5, 4)):
        request = make_request(subject.schedule, [seed], [length])
        request = with_sampler(request, type(request.sampler)(seeds=(key,)))
        assert not torch.equal(run(subject, load_policy("full"), request).f_hat, base)
